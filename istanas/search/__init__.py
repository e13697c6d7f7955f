"""The search algorithms, as steps and epochs over any batches."""

from istanas.search.state import NodeReport, RecoveryReport
from istanas.search.two_stage import TwoStageSearch, TwoStageSettings

__all__ = ["NodeReport", "RecoveryReport", "TwoStageSearch", "TwoStageSettings"]
