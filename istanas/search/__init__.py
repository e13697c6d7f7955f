"""The search algorithms, as steps and epochs over batches of pictures."""

from istanas.methods import METHODS, SearchMethod, register_method
from istanas.search.alternating import AlternatingSearch
from istanas.search.base import NodeReport, RecoveryReport, Search
from istanas.search.one_stage import Freezing, OneStageSearch
from istanas.search.two_stage import TwoStageSearch
from istanas.settings import (
    CLOSING_EPOCHS,
    AlternatingSettings,
    OneStageSettings,
    SearchSettings,
    TwoStageSettings,
)

__all__ = [
    "CLOSING_EPOCHS",
    "METHODS",
    "AlternatingSearch",
    "AlternatingSettings",
    "Freezing",
    "NodeReport",
    "OneStageSearch",
    "OneStageSettings",
    "RecoveryReport",
    "Search",
    "SearchMethod",
    "SearchSettings",
    "TwoStageSearch",
    "TwoStageSettings",
    "register_method",
]
