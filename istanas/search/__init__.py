"""The search methods, as steps and epochs over batches of pictures."""

from istanas.methods import METHODS, SearchMethod, register_method
from istanas.search.alternating import AlternatingSearch
from istanas.search.base import NodeReport, RecoveryReport, Search
from istanas.search.darts import DartsSearch
from istanas.search.gdas import GdasSearch
from istanas.search.one_stage import Freezing, OneStageSearch
from istanas.search.pc_darts import PcDartsSearch
from istanas.search.random_nas import RandomNasSearch
from istanas.search.random_search import RandomSearch
from istanas.search.two_stage import TwoStageSearch
from istanas.settings import (
    CLOSING_EPOCHS,
    AlternatingSettings,
    DartsSettings,
    GdasSettings,
    OneStageSettings,
    PcDartsSettings,
    RandomNasSettings,
    RandomSettings,
    SearchSettings,
    TwoStageSettings,
)

__all__ = [
    "CLOSING_EPOCHS",
    "METHODS",
    "AlternatingSearch",
    "AlternatingSettings",
    "DartsSearch",
    "DartsSettings",
    "Freezing",
    "GdasSearch",
    "GdasSettings",
    "NodeReport",
    "OneStageSearch",
    "OneStageSettings",
    "PcDartsSearch",
    "PcDartsSettings",
    "RandomNasSearch",
    "RandomNasSettings",
    "RandomSearch",
    "RandomSettings",
    "RecoveryReport",
    "Search",
    "SearchMethod",
    "SearchSettings",
    "TwoStageSearch",
    "TwoStageSettings",
    "register_method",
]
