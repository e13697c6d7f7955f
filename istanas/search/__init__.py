"""The search algorithms, as steps and epochs over any batches."""

from istanas.search.one_stage import CLOSING_EPOCHS, Freezing, OneStageSearch, OneStageSettings
from istanas.search.state import NodeReport, RecoveryReport
from istanas.search.two_stage import TwoStageSearch, TwoStageSettings

__all__ = [
    "CLOSING_EPOCHS",
    "Freezing",
    "NodeReport",
    "OneStageSearch",
    "OneStageSettings",
    "RecoveryReport",
    "TwoStageSearch",
    "TwoStageSettings",
]
