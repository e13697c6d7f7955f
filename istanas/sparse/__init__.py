"""Sparse coding: recovery of every node's code from its compressed parameters, and its edge weights."""

from istanas.sparse.certificates import DECISION_TOL, Certificate, certificate, duality_gap
from istanas.sparse.convex import mosek_licence
from istanas.sparse.costs import cost_weights
from istanas.sparse.lasso import (
    critical_l1,
    dual_point,
    kkt_holds,
    kkt_violation,
    objective,
    support_margin,
    top_support,
    truncation_error,
)
from istanas.sparse.measurement import edge_weights, gram_bias, initial_compressed_alphas, measurement_matrix
from istanas.sparse.recovery import (
    FALLBACKS,
    SOLVERS,
    RecoveryResult,
    RecoveryWarning,
    recover,
    recover_certified,
    recover_nodes,
)

__all__ = [
    "DECISION_TOL",
    "FALLBACKS",
    "SOLVERS",
    "Certificate",
    "RecoveryResult",
    "RecoveryWarning",
    "certificate",
    "cost_weights",
    "critical_l1",
    "dual_point",
    "duality_gap",
    "edge_weights",
    "gram_bias",
    "initial_compressed_alphas",
    "kkt_holds",
    "kkt_violation",
    "measurement_matrix",
    "mosek_licence",
    "objective",
    "recover",
    "recover_certified",
    "recover_nodes",
    "support_margin",
    "top_support",
    "truncation_error",
]
