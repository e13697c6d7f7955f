"""The search algorithms, as steps and epochs over any batches."""

from istanas.search.one_stage import Freezing, OneStageSearch, OneStageSettings
from istanas.search.state import NodeReport, RecoveryReport
from istanas.search.two_stage import TwoStageSearch, TwoStageSettings

__all__ = [
    "Freezing",
    "NodeReport",
    "OneStageSearch",
    "OneStageSettings",
    "RecoveryReport",
    "TwoStageSearch",
    "TwoStageSettings",
]
