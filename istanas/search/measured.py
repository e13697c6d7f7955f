"""Search by measurements: short trainings of whole architectures, which reveal the effects of the candidates.

The model is linear, with one effect for each candidate, and is fitted by Bayesian ridge regression, whose prior shares
effects between the places of an operation. It is related to compressed sensing with architectures as rows of the
measurement matrix (Harmonica, CoNAS), which fits sparse effects. Nothing is shared between the trainings, so a
measurement has no bias from other architectures, and the design of the measurements is free. The first architectures
are a balanced design; each of the others is drawn by Thompson sampling from the posterior of the effects, so that the
search measures where the best architecture may be.

The architectures are trained one after the other, or several at a time (`MeasuredSettings.max_concurrent`).

- One after the other: an epoch of the search trains the current architecture for one epoch, and a measurement takes one
  or more epochs, see `MeasuredSettings.stages`.
- Several at a time: the search trains nothing itself. Its caller draws measurements (`MeasuredSearch.draw`), trains
  them anywhere (`MeasuredSearch.hold`, in a search of its own), and returns their losses as they finish
  (`MeasuredSearch.receive`). An epoch of the search is then one finished measurement. The scheduling is asynchronous:
  the next architecture is drawn as soon as there is room, from the posterior of the measurements that are finished.
  Pending architectures are excluded, so that concurrent draws differ.

The initial weights and the pictures of a measurement are determined by its number, so that the same architecture with
the same number has the same loss, bit for bit, wherever it is trained. With several at a time, the order in which
measurements finish depends on the machines, and with it what is drawn next.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from istanas.effects.budget import Budget
from istanas.effects.choice import (
    Improvement,
    best_architecture,
    choice_probabilities,
    count_within,
    improvement,
    thompson,
)
from istanas.effects.coding import Architecture, layout, supports_of
from istanas.effects.design import balanced_design
from istanas.effects.fit import fit_effects
from istanas.effects.model import levels
from istanas.effects.posterior import Posterior
from istanas.effects.summary import EffectsSummary, count_certain, predicted_score, summarize
from istanas.errors import ConfigError, DivergedError
from istanas.nets import ArchitectureNetwork, to_channels_last
from istanas.optimizers import SGD
from istanas.search.base import Batches, Choosing, RecoveryReport, Search
from istanas.settings import LEAST_LAYERS, Fidelity, MeasuredSettings
from istanas.space import Decision, Genotype, NetworkSize, SearchSpace
from istanas.training import (
    BatchLike,
    Metrics,
    Observer,
    Totals,
    check_finite,
    derive_seed,
    learning_rate,
    train_target_epoch,
    train_target_step,
)

_DIVERGED = Metrics(math.inf, 0.0, 0)
N_DRAWS = 1000  # from the posterior: the standard error of a probability is at most 0.016


@dataclass(frozen=True)
class Planned:
    """A measurement that has been decided on and is not finished.

    Args:
        number: Its number, from 0 in the order of the decisions. It determines the initial weights and the pictures.
        kept: The candidates of the architecture, see `istanas.effects.Architecture`.
        fidelity: Number of layers of its network, and number of epochs of its training.
    """

    number: int
    kept: Architecture
    fidelity: Fidelity


@dataclass(frozen=True)
class Measurement:
    """The measured loss of one architecture.

    Args:
        kept: Its candidates, see `istanas.effects.Architecture`.
        fidelity: Number of layers of its network, and number of epochs of its training.
        loss: Mean cross-entropy on the pictures for choosing; infinite or NaN if the training has diverged.
        top1: Accuracy on these pictures, in [0, 1].
    """

    kept: Architecture
    fidelity: Fidelity
    loss: float
    top1: float


def check_stages(space: SearchSpace, size: NetworkSize, settings: MeasuredSettings) -> None:
    """Check that the stages of a search can be measured, whatever its limits.

    Args:
        space: The search space.
        size: The size of the networks in stages without layers.
        settings: The settings of the search.

    Raises:
        ConfigError: If the first of several stages has one measurement, so that there is no posterior after it, if a
            fidelity has more measurements than the space has architectures, or if the space has no networks with the
            layers of a stage.
    """
    stages = settings.stages
    if len(stages) > 1 and stages[0][0] < 2:
        raise ConfigError(
            f"the first of {len(stages)} stages has 1 measurement", field="stages", remedy="give it 2 or more"
        )
    there = space.n_architectures
    for fidelity, wanted in Counter(settings.schedule(size.layers)).items():
        if wanted > there:
            raise ConfigError(
                f"{wanted} measurements of {fidelity}, and the space has {there} architectures",
                field="stages",
                remedy=f"use at most {there} at each fidelity",
            )
    for layers in {fidelity.layers for fidelity in settings.fidelities(size.layers)} - {size.layers}:
        if layers < LEAST_LAYERS:
            raise ConfigError(
                f"networks of {layers} layers", field="stages", remedy=f"use at least {LEAST_LAYERS} layers"
            )
        try:
            space.check_size(replace(size, layers=layers))
        except ConfigError as error:
            # The space names the key layers, but the number is one of stages.
            field = "stages" if error.field == "layers" else error.field
            raise ConfigError(error.problem, field=field, remedy=error.remedy) from None


def has_effects(measurements: Sequence[Measurement]) -> bool:
    """Return whether effects can be distinguished from the offsets of the fidelities."""
    return len(measurements) > len({m.fidelity for m in measurements})


def posterior_of(space: SearchSpace, measurements: Sequence[Measurement], seed: int) -> Posterior:
    """Return the posterior of the effects after these measurements of a search with this seed."""
    return fit_effects(
        space,
        [m.kept for m in measurements],
        [m.loss for m in measurements],
        levels([m.fidelity for m in measurements]),
        n_draws=N_DRAWS,
        seed=derive_seed(seed, "measured", "posterior", len(measurements)),
    )


def summary_of(
    space: SearchSpace, measurements: Sequence[Measurement], seed: int, budget: Budget | None = None
) -> EffectsSummary | None:
    """Return what the measurements of a search with this seed have shown; `None` if they are too few for effects."""
    if not has_effects(measurements):
        return None
    return summarize(
        space,
        posterior_of(space, measurements, seed),
        [m.kept for m in measurements],
        [m.loss for m in measurements],
        levels([m.fidelity for m in measurements]),
        seed=derive_seed(seed, "measured", "thompson", len(measurements)),
        budget=budget,
    )


class MeasuredSearch(Search[MeasuredSettings]):
    """A search by measurements: the measurements so far, and the training of the current architecture.

    The result is the architecture with the highest posterior mean, whether it was measured or not. With limits, only
    architectures within them are measured and chosen.

    Args:
        supernet: An `ArchitectureNetwork`, which has the space and the size of the networks.
        settings, compute, seed, ranks, cost, candidate_costs: See `Search`.

    Attributes:
        measurements: The finished measurements, in the order in which they finished.
        pending: The measurements that are drawn and not finished: the current one, or those that are trained elsewhere.
        posterior: The posterior of the effects; `None` before there are more measurements than fidelities.

    Example:
        >>> from istanas.space import CellSpace, NetworkSize
        >>> from istanas.training import Compute
        >>> net = ArchitectureNetwork(CellSpace(n_nodes=1), NetworkSize(2, 3, 10))
        >>> search = MeasuredSearch(net, MeasuredSettings(stages=((2, 1),)), Compute(torch.device("cpu")), seed=0)
        >>> batch = (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
        >>> search.train_epoch([batch], lambda: [batch], n_steps=1).count
        2

    Source:
        Hazan, Klivans, Yuan, Hyperparameter Optimization: A Spectral Approach (Harmonica), ICLR 2018, and Cho, Soltani,
        Hegde, One-Shot Neural Architecture Search via Compressive Sensing, 2019, recover sparse effects from random
        designs. Thompson, Biometrika 1933.
    """

    kind = "measured"
    has_supernet = False
    state_version = 3  # Measurements have a number of layers.
    accepts_divergence = True
    supernet: ArchitectureNetwork

    @classmethod
    def alpha_size(cls, settings: MeasuredSettings, decision: Decision) -> int:
        """Return 0, because there are no alphas."""
        return 0

    def begin(self) -> RecoveryReport:
        """Prepare the search, and report its decisions before any training."""
        self.space = self.supernet.space
        check_stages(self.space, self.supernet.size, self.settings)
        self.limits.check()
        self._budget = self.limits.budget()
        self._schedule = self.settings.schedule(self.supernet.size.layers)
        if self._budget is not None:
            self._check_number_within(self._budget)
        self.measurements: list[Measurement] = []
        self.pending: list[Planned] = []
        self.posterior: Posterior | None = None
        self._best = self._balanced(0)
        self._improvement: Improvement | None = None
        self._certain = 0  # choices of the best architecture
        self._newest: dict[str, float] = {}  # the metrics of the measurement that the epoch has finished
        if not self.is_concurrent:
            self.hold(self._drawn())
        return self._report(self._best)

    def _check_number_within(self, budget: Budget) -> None:
        """Check that the limits leave an architecture for each measurement of a fidelity.

        Raises:
            ConfigError: If they do not.
        """
        for fidelity, wanted in Counter(self._schedule).items():
            within = count_within(self.space, budget, wanted)
            if wanted > within:
                raise ConfigError(
                    f"{wanted} measurements of {fidelity}, and {within} architectures are within the limits",
                    field="stages",
                    remedy=f"raise them, or use at most {within}",
                )

    @property
    def _n_balanced(self) -> int:
        """Number of measurements of the balanced design, at least the two that a posterior needs."""
        return min(len(self._schedule), max(2, math.ceil(self.settings.balanced * len(self._schedule))))

    def _balanced(self, number: int) -> Architecture:
        """Return a row of the balanced design. Its first rows do not depend on the number of rows."""
        seed = derive_seed(self.seed, self.kind, "design")
        return balanced_design(self.space, number + 1, seed, self._budget)[number]

    @property
    def is_concurrent(self) -> bool:
        """Whether several architectures are measured at a time, outside of this search."""
        return self.settings.trials_at_once > 1

    # ---------- the current architecture

    def hold(self, planned: Planned) -> None:
        """Make a planned measurement the current one, and create its network."""
        s = self.settings
        self.current, self._trained = planned, 0
        self._measured: Metrics | None = None
        torch.manual_seed(derive_seed(self.seed, self.kind, "init", planned.number))
        size = replace(self.supernet.size, layers=planned.fidelity.layers)
        net = self.space.target(self.trained_genotype(), size)
        to_channels_last(net.to(self.compute.device))
        self.supernet.replace_network(net)
        self._optimizer = SGD(
            net.parameters(),
            s.lr,
            momentum=s.momentum,
            weight_decay=s.weight_decay,
            fused=self.compute.device.type == "cuda",
        )

    @property
    def is_measured(self) -> bool:
        """Whether the training of the current architecture is complete."""
        return self._trained == self.current.fidelity.epochs

    def picture_epoch(self, epoch: int) -> int:
        """Return the number of scheduled epochs before the current one, which a diverged training does not change."""
        return sum(fidelity.epochs for fidelity in self._schedule[: self.current.number]) + self._trained

    def train_epoch(
        self,
        weight_batches: Iterable[BatchLike],
        alpha_batches: Batches | None,
        n_steps: int,
        observe: Observer | None = None,
        *,
        lr_factor: float = 1.0,
    ) -> Metrics | None:
        """Train the current architecture for one epoch.

        Returns:
            The metrics of the training; `None` if it has diverged. Then the measurement ends.
        """
        s, start, total = self.settings, self._trained, self.current.fidelity.epochs
        metrics = train_target_epoch(
            self.supernet.network,
            self._optimizer,
            weight_batches,
            self.compute,
            lr_at=lambda step: lr_factor * learning_rate(s.lr, s.lr_min, start + step / n_steps, total),
            auxiliary_weight=0.0,
            label_smoothing=0.0,
            grad_clip=s.grad_clip,
            observe=observe,
            ranks=self.ranks,
        )
        self.epoch += 1
        self._trained += 1
        try:
            check_finite(metrics, self.supernet.parameters(), self.epoch, ranks=self.ranks)
        except DivergedError:
            self._trained = total
            self._measured = _DIVERGED
            return None
        return metrics

    def train_step(self, batch: BatchLike, alpha_batch: BatchLike | None) -> None:
        """Run one step of the current architecture."""
        train_target_step(
            self.supernet.network.forward_with_auxiliary,
            self._optimizer,
            batch,
            self.compute,
            Totals(self.compute.device),
            auxiliary_weight=0.0,
            label_smoothing=0.0,
            grad_clip=self.settings.grad_clip,
        )

    def validate_epoch(self, choosing: Choosing) -> Metrics | None:
        """Measure the current architecture after its last epoch; before, return `None`."""
        if self.is_measured and self._measured is None:
            if self.settings.calibration_batches:
                self.recalibrate(islice(choosing.training(), self.settings.calibration_batches))
            self._measured = choosing()
        return self._measured

    # ---------- several at a time

    def draw(self) -> Planned | None:
        """Decide on the next measurement, which is pending from then on; `None` if all are pending or finished."""
        n_drawn = len(self.measurements) + len(self.pending)
        return None if n_drawn == len(self._schedule) else self._drawn()

    def receive(self, planned: Planned, measured: Metrics | None) -> RecoveryReport:
        """Add a measurement that was trained elsewhere, and report the decisions, like `finish_epoch`.

        Args:
            planned: One of `pending`.
            measured: The metrics of its validation; `None` if its training has diverged.

        Raises:
            DivergedError: As in `finish_epoch`.
        """
        self.current, self._trained = planned, planned.fidelity.epochs
        self._measured = measured or _DIVERGED
        self.epoch += 1
        return self.finish_epoch()

    # ---------- choosing

    def finish_epoch(self) -> RecoveryReport:
        """Add the measurement if it is complete, and choose the next architecture.

        Raises:
            DivergedError: If all measurements of the balanced design have infinite losses.
        """
        before, self._newest = self._best, {}
        if self.is_measured:
            assert self._measured is not None, "the pictures for choosing measure every architecture"
            done, metrics = self.current, self._measured
            self._newest = self._prediction() | {
                "measured/epochs": float(done.fidelity.epochs),
                "measured/layers": float(done.fidelity.layers),
            }
            self.measurements.append(Measurement(done.kept, done.fidelity, metrics.loss, metrics.top1))
            self.pending = [planned for planned in self.pending if planned.number != done.number]
            self._learn()
            self._check_trained()
            if not self.is_done and not self.is_concurrent:
                self.hold(self._drawn())
        self.ranks.check_same("genotype", self.genotype().digest())
        self.ranks.check_same("next architecture", self.trained_genotype().digest())
        return self._report(before)

    def _check_trained(self) -> None:
        """Check that not all trainings have diverged.

        Raises:
            DivergedError: If all measurements of the balanced design have infinite losses.
        """
        n = len(self.measurements)
        if n >= self._n_balanced and not any(math.isfinite(m.loss) for m in self.measurements):
            raise DivergedError(
                f"all {n} trainings have diverged", field="search.lr", remedy="lower it, or search.grad_clip"
            )

    def _learn(self) -> None:
        """Fit the effects to all measurements, and find the best architecture."""
        if not has_effects(self.measurements):
            return
        self.posterior = posterior_of(self.space, self.measurements, self.seed)
        self._best = best_architecture(self.space, self.posterior.mean, budget=self._budget)
        self._improvement = improvement(
            self.space, self.posterior, self._best, margin=self.settings.stop_margin, budget=self._budget
        )
        self._certain = count_certain(
            choice_probabilities(self.space, self.posterior, self._best, self._budget)
        )

    def _drawn(self) -> Planned:
        """Return the next measurement, now pending: of the design, or the best architecture of a posterior draw."""
        number = len(self.measurements) + len(self.pending)
        fidelity = self._schedule[number]
        if number < self._n_balanced or self.posterior is None:
            kept = self._balanced(number)
        else:
            (kept,) = thompson(
                self.space,
                self.posterior,
                1,
                derive_seed(self.seed, self.kind, "thompson", number),
                excluded={m.kept for m in self.measurements if m.fidelity == fidelity}
                | {p.kept for p in self.pending if p.fidelity == fidelity},
                budget=self._budget,
            )
        planned = Planned(number, kept, fidelity)
        self.pending.append(planned)
        return planned

    @property
    def is_done(self) -> bool:
        """Whether all measurements are finished."""
        return len(self.measurements) == len(self._schedule)

    def has_converged(self, report: RecoveryReport) -> bool:
        """Return whether an improvement has become improbable, see `MeasuredSettings.stop_probability`."""
        s = self.settings
        if (
            s.stop_probability is None
            or self._improvement is None
            or len(self.measurements) < self._n_balanced
        ):
            return False
        return self._improvement.probability < s.stop_probability

    def genotype(self) -> Genotype:
        """Return the architecture with the highest posterior mean."""
        return self.space.genotype(supports_of(self.space, self._best))

    def trained_genotype(self) -> Genotype:
        """Return the architecture that is being trained, or was received last."""
        return self.genotype_of(self.current)

    def genotype_of(self, planned: Planned) -> Genotype:
        """Return the architecture of a planned measurement."""
        return self.space.genotype(supports_of(self.space, planned.kept))

    def metrics(self) -> dict[str, float]:
        """Return figures of the measurement that the epoch has finished, if any, and of the posterior."""
        found = {"measured/count": float(len(self.measurements)), **self._newest}
        if self.posterior is None or self._improvement is None:
            return found
        return {
            **found,
            "measured/noise": math.sqrt(self.posterior.noise_variance),
            "measured/expected_improvement": self._improvement.expected,
            "measured/certain_choices": float(self._certain),
        }

    def _prediction(self) -> dict[str, float]:
        """Return the predicted score of the current architecture; empty if there is no posterior yet."""
        if self.posterior is None:
            return {}
        score, deviation = predicted_score(self.space, self.posterior, self.current.kept)
        return {"measured/predicted": score, "measured/predicted_deviation": deviation}

    def _report(self, before: Architecture) -> RecoveryReport:
        """Report the best architecture. The magnitudes are the effects above the smallest one of each decision."""
        old, new = supports_of(self.space, before), supports_of(self.space, self._best)
        parts = dict(zip(self.places, layout(self.space).parts(), strict=True))
        nodes = []
        for kind, index in self.places:
            support = new[kind][index]
            effects = None if self.posterior is None else self.posterior.mean[parts[kind, index]]
            nodes.append(
                self.uncertified_report(
                    (kind, index),
                    support,
                    [1.0] * len(support),
                    changed=support != old[kind][index],
                    magnitudes=() if effects is None else (effects - effects.min()).tolist(),
                )
            )
        return RecoveryReport(nodes, certified=False)

    # ---------- the state

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which `load_state_dict` resumes the search bit for bit."""
        state = {
            **super().state_dict(),
            "measurements": [(m.kept, tuple(m.fidelity), m.loss, m.top1) for m in self.measurements],
        }
        if self.is_concurrent:
            return {**state, "pending": [(p.number, p.kept, tuple(p.fidelity)) for p in self.pending]}
        return {
            **state,
            "current": self.current.kept,
            "trained": self._trained,
            "network": self.supernet.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`.

        Raises:
            CheckpointError: If the state is of another kind or version.
        """
        super().load_state_dict(state)
        self.measurements = [
            Measurement(tuple(kept), Fidelity(*fidelity), loss, top1)
            for kept, fidelity, loss, top1 in state["measurements"]
        ]
        self._learn()
        if self.is_concurrent:
            self.pending = [
                Planned(number, tuple(kept), Fidelity(*fidelity))
                for number, kept, fidelity in state["pending"]
            ]
            return
        # After its last measurement, the search still holds that one.
        number = min(len(self.measurements), len(self._schedule) - 1)
        current = Planned(number, tuple(state["current"]), self._schedule[number])
        self.pending = [] if self.is_done else [current]
        self.hold(current)
        self._trained = int(state["trained"])
        self.supernet.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
