"""The search algorithms, as steps and epochs over batches of pictures."""

from istanas.search.one_stage import Freezing, OneStageSearch
from istanas.search.state import NodeReport, RecoveryReport
from istanas.search.two_stage import TwoStageSearch
from istanas.settings import CLOSING_EPOCHS, OneStageSettings, SearchSettings, TwoStageSettings

__all__ = [
    "CLOSING_EPOCHS",
    "Freezing",
    "NodeReport",
    "OneStageSearch",
    "OneStageSettings",
    "RecoveryReport",
    "SearchSettings",
    "TwoStageSearch",
    "TwoStageSettings",
]
