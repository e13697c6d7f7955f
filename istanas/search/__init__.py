"""The search algorithms, as steps and epochs over batches of pictures."""

from istanas.methods import METHODS, SearchMethod, register_method
from istanas.search.alternating import AlternatingSearch
from istanas.search.base import NodeReport, RecoveryReport, Search
from istanas.search.darts import DartsSearch
from istanas.search.one_stage import Freezing, OneStageSearch
from istanas.search.pc_darts import PcDartsSearch
from istanas.search.two_stage import TwoStageSearch
from istanas.settings import (
    CLOSING_EPOCHS,
    AlternatingSettings,
    DartsSettings,
    OneStageSettings,
    PcDartsSettings,
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
    "NodeReport",
    "OneStageSearch",
    "OneStageSettings",
    "PcDartsSearch",
    "PcDartsSettings",
    "RecoveryReport",
    "Search",
    "SearchMethod",
    "SearchSettings",
    "TwoStageSearch",
    "TwoStageSettings",
    "register_method",
]
