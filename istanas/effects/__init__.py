"""Effects of candidates from measured architectures: balanced designs, sparse and Bayesian fits, and choices.

Architectures are the rows of a measurement matrix, their scores the measurements, and the effects of the candidates
the sparse code. Everything is a pure function of numbers; nothing is trained here.
"""

from istanas.effects.budget import Budget, relaxed
from istanas.effects.choice import (
    Improvement,
    best_architecture,
    best_of_draws,
    choice_probabilities,
    count_within,
    improvement,
    kept_probabilities,
    probability_best,
    ranked_architectures,
    thompson,
)
from istanas.effects.coding import (
    Architecture,
    Layout,
    architecture,
    coded,
    incidence,
    layout,
    sum_to_zero,
    supports_of,
)
from istanas.effects.design import balanced_design
from istanas.effects.fidelity import join_fidelities, next_fidelity
from istanas.effects.fit import effects_system, fit_effects
from istanas.effects.model import (
    Fidelities,
    System,
    levels,
    linear_system,
    log_scores,
    normal_scores,
    offsets,
    repeat_variance,
    scores,
)
from istanas.effects.posterior import Posterior, log_evidence, ridge, ridge_moments, ridge_variances
from istanas.effects.sharing import operations, prior_root
from istanas.effects.sparse_fit import SparsePath, sparse_path
from istanas.effects.spike import gibbs_sweep, spike_and_slab
from istanas.effects.summary import (
    CERTAIN,
    INTERVAL,
    TOSS_UP,
    EffectsSummary,
    count_certain,
    predicted_score,
    summarize,
)

__all__ = [
    "CERTAIN",
    "INTERVAL",
    "TOSS_UP",
    "Architecture",
    "Budget",
    "EffectsSummary",
    "Fidelities",
    "Improvement",
    "Layout",
    "Posterior",
    "SparsePath",
    "System",
    "architecture",
    "balanced_design",
    "best_architecture",
    "best_of_draws",
    "choice_probabilities",
    "coded",
    "count_certain",
    "count_within",
    "effects_system",
    "fit_effects",
    "gibbs_sweep",
    "improvement",
    "incidence",
    "join_fidelities",
    "kept_probabilities",
    "layout",
    "levels",
    "linear_system",
    "log_evidence",
    "log_scores",
    "next_fidelity",
    "normal_scores",
    "offsets",
    "operations",
    "predicted_score",
    "prior_root",
    "probability_best",
    "ranked_architectures",
    "relaxed",
    "repeat_variance",
    "ridge",
    "ridge_moments",
    "ridge_variances",
    "scores",
    "sparse_path",
    "spike_and_slab",
    "sum_to_zero",
    "summarize",
    "supports_of",
    "thompson",
]
