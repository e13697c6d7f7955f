"""Search by measurements: what is trained and measured, what is measured next, and what the result is."""

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from istanas.candidates import candidate_costs
from istanas.data import Batch
from istanas.effects.choice import best_architecture
from istanas.effects.coding import Architecture, architecture, coded, layout, sum_to_zero, supports_of
from istanas.effects.design import balanced_design
from istanas.effects.summary import count_certain
from istanas.errors import ConfigError, DivergedError
from istanas.measure import Cost
from istanas.nets import ArchitectureNetwork
from istanas.search.measured import MeasuredSearch, Measurement, Planned, summary_of
from istanas.settings import Fidelity, MeasuredSettings
from istanas.space import CellSpace, Genotype, NasBench201Space, NetworkSize, SearchSpace
from istanas.training import Compute, Metrics, derive_seed

CPU = Compute(torch.device("cpu"))
BENCH = NasBench201Space()
TINY = MeasuredSettings(stages=((2, 2), (1, 1)), calibration_batches=0)


def make(
    settings: MeasuredSettings = TINY, space: SearchSpace = BENCH, seed: int = 0, kind: Any = MeasuredSearch
) -> Any:
    layers = 5 if isinstance(space, NasBench201Space) else 3
    net = ArchitectureNetwork(space, NetworkSize(2, layers, 5, in_channels=1))
    return kind(net, settings, CPU, seed=seed)


def batch(seed: int, n: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 5)


class Half:
    """The pictures for choosing."""

    def __init__(self, search: MeasuredSearch) -> None:
        self.search = search

    def __call__(self) -> Metrics:
        return self.search.validate(self.pictures())

    def pictures(self, count: int | None = None) -> list[Batch]:
        return [batch(50), batch(51)]

    def training(self) -> list[Batch]:
        return [batch(step) for step in range(3)]


def run_epoch(search: MeasuredSearch) -> tuple[Metrics | None, Metrics | None]:
    trained = search.train_epoch([batch(step) for step in range(3)], lambda: [batch(9)], n_steps=3)
    measured = search.validate_epoch(Half(search)) if trained is not None else None
    search.finish_epoch()
    return trained, measured


class Planted(MeasuredSearch):
    """A search whose measurements are planted effects with noise; nothing is trained."""

    noise = 1.0

    def begin(self) -> Any:
        rng = np.random.default_rng(self.seed)
        self.truth = rng.standard_normal(layout(self.supernet.space).n_candidates)
        return super().begin()

    def score(self, kept: Architecture) -> float:
        return float(self.truth[list(kept)].sum())

    def train_epoch(self, *_: Any, **__: Any) -> Metrics:
        self.epoch += 1
        self._trained += 1
        return Metrics(0.0, 0.0, 1)

    def validate_epoch(self, choosing: Any) -> Metrics | None:
        rng = np.random.default_rng((self.seed, len(self.measurements)))
        loss = math.exp(-self.score(self.current.kept) - self.noise * rng.standard_normal())
        self._measured = Metrics(loss, 0.0, 1)
        return self._measured


def planted(settings: MeasuredSettings, seed: int, space: SearchSpace = BENCH) -> Planted:
    search: Planted = make(settings, space, seed, Planted)
    report = search.first_recovery
    while not search.is_done and not search.has_converged(report):
        search.train_epoch([], None, 0)
        search.validate_epoch(None)
        report = search.finish_epoch()
    return search


# ---------- measurements


@pytest.mark.parametrize("calibration_batches", [0, 3])
def test_a_measurement_is_a_short_training_from_scratch(calibration_batches: int) -> None:
    """The literal training of the second architecture has the same loss as the search's second measurement."""
    settings = MeasuredSettings(stages=((3, 2),), grad_clip=None, calibration_batches=calibration_batches)
    search = make(settings)
    outcomes = [run_epoch(search) for _ in range(4)]
    assert [measured is None for _, measured in outcomes] == [True, False, True, False]
    torch.manual_seed(derive_seed(0, "measured", "init", 1))
    kept = balanced_design(BENCH, 2, derive_seed(0, "measured", "design"))[1]
    net = BENCH.target(BENCH.genotype(supports_of(BENCH, kept)), NetworkSize(2, 5, 5, in_channels=1)).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=3e-4)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.001 + 0.099 * (1 + math.cos(math.pi * step / 6)) / 2
        optimizer.zero_grad()
        images, target = batch(step % 3)[:2]
        F.cross_entropy(net(images), target).backward()
        optimizer.step()
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    if calibration_batches:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
        with torch.no_grad():
            for step in range(3):
                net(batch(step).images)
    net.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(net(b[0]), b[1]).item() for b in Half(search).pictures()]
    assert search.measurements[1] == Measurement(
        kept, Fidelity(5, 2), pytest.approx(sum(losses) / 2, rel=1e-5), search.measurements[1].top1
    )
    assert outcomes[3][1] is not None
    assert outcomes[3][1].loss == search.measurements[1].loss


def test_the_stages_have_their_own_epochs() -> None:
    search = make(MeasuredSettings(stages=((2, 1), (1, 3)), balanced=0))
    for _ in range(5):
        assert not search.is_done
        run_epoch(search)
    assert search.is_done
    assert [m.fidelity for m in search.measurements] == [(5, 1), (5, 1), (5, 3)]
    assert search.settings.max_epochs == search.epoch == 5


def test_the_stages_have_their_own_layers() -> None:
    search = make(MeasuredSettings(stages=((2, 1), (1, 2, 11), (1, 1, 8)), balanced=0))
    seen = []
    while not search.is_done:
        seen.append((len(search.supernet.network.network.layers), search.current.fidelity))
        run_epoch(search)
        if "measured/epochs" in search.metrics():
            assert search.metrics()["measured/layers"] == seen[-1][0]
    assert seen == [(5, (5, 1)), (5, (5, 1)), (11, (11, 2)), (11, (11, 2)), (8, (8, 1))]
    assert [m.fidelity for m in search.measurements] == [(5, 1), (5, 1), (11, 2), (8, 1)]


def test_a_diverged_training_is_a_measurement_of_infinite_loss() -> None:
    """It ends at once, and the search continues with the next architecture, unless all of the design diverge."""
    search = make(MeasuredSettings(stages=((3, 2),), lr=1e30, grad_clip=None))
    first = search.current
    trained, measured = run_epoch(search)
    assert trained is None
    assert measured is None
    assert search.measurements == [Measurement(first.kept, Fidelity(5, 2), math.inf, 0.0)]
    assert search.current != first
    with pytest.raises(DivergedError, match=r"^search\.lr: all 2 trainings have diverged; lower it"):
        run_epoch(search)


def test_a_search_of_two_fidelities_survives_diverged_trainings() -> None:
    """The losses of a stage may all be infinite; the effects are then those of the other stage."""

    class Diverging(Planted):
        def validate_epoch(self, choosing: Any) -> Metrics | None:
            super().validate_epoch(choosing)
            if self.current.fidelity.epochs == 2:
                self._measured = Metrics(math.inf, 0.0, 1)
            return self._measured

    search = make(MeasuredSettings(stages=((30, 1), (5, 2))), BENCH, 0, Diverging)
    while not search.is_done:
        search.train_epoch([], None, 0)
        search.validate_epoch(None)
        search.finish_epoch()
    assert [m.loss for m in search.measurements[30:]] == [math.inf] * 5
    assert np.isfinite(search.posterior.mean).all()


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        (((1, 1), (5, 2)), "stages: the first of 2 stages has 1 measurement; give it 2 or more"),
        (
            ((30, 1), (35, 1)),
            "stages: 65 measurements of 1 epoch of 5 layers, and the space has 64 architectures; use at most 64",
        ),
        (((2, 1), (2, 1, 2)), "stages: networks of 2 layers; use at least 3 layers"),
        (
            ((2, 1), (2, 1, 6)),
            "stages: 6 is not 3 N + 2, the layers of a network with 3 stages of N cells and 2 residual blocks between "
            "them, as nas_bench_201 requires; choose 5 or 8",
        ),
    ],
)
def test_stages_that_cannot_be_measured_are_rejected(stages: Any, says: str) -> None:
    space = NasBench201Space(ops=("skip_connect", "nor_conv_1x1"))
    with pytest.raises(ConfigError, match=f"^{re.escape(says)}"):
        make(MeasuredSettings(stages=stages), space)


# ---------- several at a time


def train(search: MeasuredSearch, planned: Planned) -> Metrics:
    """Train and measure a planned architecture, as a trial does."""
    search.hold(planned)
    while not search.is_measured:
        search.train_epoch([batch(step) for step in range(3)], lambda: [batch(9)], n_steps=3)
    measured = search.validate_epoch(Half(search))
    assert measured is not None
    return measured


def test_a_measurement_elsewhere_equals_that_of_the_search() -> None:
    """The same number and architecture give the same loss, bit for bit, in any order."""
    settings = MeasuredSettings(stages=((2, 2), (1, 1)), max_concurrent=3)
    one_by_one = make(replace(settings, max_concurrent=1))
    while not one_by_one.is_done:
        run_epoch(one_by_one)
    search = make(settings)
    first, second, third = (search.draw() for _ in range(3))
    assert search.draw() is None
    assert [(p.number, p.fidelity.epochs) for p in search.pending] == [(0, 2), (1, 2), (2, 1)]
    for planned in (second, first):
        trial = make(settings)
        search.receive(planned, train(trial, planned))
    assert search.measurements == one_by_one.measurements[1::-1]
    assert search.pending == [third]
    assert search.receive(third, None).nodes
    assert search.is_done
    assert search.measurements[2] == Measurement(third.kept, Fidelity(5, 1), math.inf, 0.0)


def test_pictures_of_a_measurement_do_not_depend_on_earlier_divergence() -> None:
    search = make(MeasuredSettings(stages=((3, 2),), lr=1e30, grad_clip=None))
    assert search.picture_epoch(search.epoch) == 0
    run_epoch(search)
    assert search.epoch == 1, "the first training has diverged in its first epoch"
    assert search.picture_epoch(search.epoch) == 2


class Places:
    """Machines with room for some trainings, which finish in a random order. The losses are planted."""

    def __init__(self, search: Planted, places: int, seed: int) -> None:
        self.search, self.places, self.rng = search, places, np.random.default_rng(seed)
        self.running: list[Planned] = list(search.pending)
        self.drawn: list[Planned] = []

    def fill(self) -> None:
        while len(self.running) < self.places and (planned := self.search.draw()) is not None:
            self.drawn.append(planned)
            self.running.append(planned)

    def finish_one(self) -> None:
        planned = self.running.pop(int(self.rng.integers(len(self.running))))
        noise = np.random.default_rng((self.search.seed, planned.number)).standard_normal()
        self.search.receive(planned, Metrics(math.exp(-self.search.score(planned.kept) - noise), 0.0, 1))


@pytest.mark.parametrize("places", [2, 5, 16])
def test_no_place_waits_and_no_architecture_is_measured_twice_in_a_stage(places: int) -> None:
    """With 16 places, nothing is known yet when the design ends; balanced rows then follow."""
    settings = MeasuredSettings(stages=((16, 1), (4, 2)), balanced=0.25, max_concurrent=places)
    machines = Places(make(settings, kind=Planted), places, seed=places)
    while not machines.search.is_done:
        machines.fill()
        started = len(machines.drawn)
        assert len(machines.running) == min(places, 20 - started + len(machines.running))
        assert machines.search.pending == sorted(machines.search.pending, key=lambda p: p.number)
        machines.finish_one()
    assert [p.number for p in machines.drawn] == list(range(20))
    assert [p.kept for p in machines.drawn[:5]] == balanced_design(
        BENCH, 5, derive_seed(0, "measured", "design")
    )
    assert len({p.kept for p in machines.drawn[:16]}) == 16
    assert len({p.kept for p in machines.drawn[16:]}) == 4
    assert len(machines.search.measurements) == settings.max_epochs == machines.search.epoch == 20


def test_a_later_stage_may_finish_before_an_earlier_one() -> None:
    """With one measurement of each fidelity, no effects can be told from the offsets yet."""
    search = make(MeasuredSettings(stages=((2, 1), (4, 2)), max_concurrent=3), kind=Planted)
    first, second, third = (search.draw() for _ in range(3))
    for planned in (third, first):
        search.receive(planned, Metrics(1.0 + planned.number, 0.5, 1))
        assert search.posterior is None
    fourth = search.draw()
    assert fourth.kept == balanced_design(BENCH, 4, derive_seed(0, "measured", "design"))[3]
    search.receive(second, Metrics(2.0, 0.5, 1))
    assert search.posterior is not None


def test_concurrent_measurements_find_planted_effects() -> None:
    """Eight places find about as good an architecture as one, see the test of one place below."""
    ranks = []
    every = np.stack(np.unravel_index(np.arange(5**6), (5,) * 6), 1) + 5 * np.arange(6)
    for seed in range(4):
        settings = MeasuredSettings(stages=((60, 1),), balanced=0.33, max_concurrent=8)
        machines = Places(make(settings, BENCH, seed, Planted), 8, seed)
        while not machines.search.is_done:
            machines.fill()
            machines.finish_one()
        truth = machines.search.truth[every].sum(1)
        ranks.append(1 + int((truth > machines.search.score(machines.search._best) + 1e-9).sum()))
    assert np.median(ranks) <= 100
    assert max(ranks) <= 1500


@pytest.mark.parametrize("killed_after", [0, 1, 9, 23])
def test_a_resumed_search_repeats_pending_measurements_and_draws_alike(killed_after: int) -> None:
    settings = MeasuredSettings(stages=((20, 1), (5, 2)), balanced=0.2, max_concurrent=3)

    def finished(machines: Places, until: int) -> None:
        while len(machines.search.measurements) < until:
            machines.fill()
            machines.finish_one()

    whole = Places(make(settings, kind=Planted), 3, seed=1)
    finished(whole, 25)
    killed = Places(make(settings, kind=Planted), 3, seed=1)
    finished(killed, killed_after)
    state = killed.search.state_dict()
    killed.fill()  # drawn after the checkpoint, and lost
    again = make(settings, kind=Planted)
    again.load_state_dict(state)
    resumed = Places(again, 3, seed=0)
    resumed.rng = killed.rng
    finished(resumed, 25)
    assert resumed.search.measurements == whole.search.measurements
    assert resumed.search.genotype() == whole.search.genotype()


# ---------- what is measured next


def test_first_architectures_are_balanced_and_none_is_measured_twice() -> None:
    search = planted(MeasuredSettings(stages=((40, 1), (10, 2)), balanced=0.3), seed=1)
    kept = [m.kept for m in search.measurements]
    assert kept[:15] == balanced_design(BENCH, 15, derive_seed(1, "measured", "design"))
    assert kept[15:40] != balanced_design(BENCH, 40, derive_seed(1, "measured", "design"))[15:]
    assert len(set(kept[:40])) == 40
    assert len(set(kept[40:])) == 10


def test_thompson_sampling_measures_better_and_better_architectures() -> None:
    better = []
    for seed in range(5):
        search = planted(MeasuredSettings(stages=((60, 1),), balanced=0.33), seed)
        scores = [search.score(m.kept) for m in search.measurements]
        better.append(np.mean(scores[40:]) - np.mean(scores[:20]))
    assert min(better) > 1.0  # a random architecture has a standard deviation of 2.2


def test_planted_effects_are_found_with_few_noisy_measurements() -> None:
    """60 of 15,625 architectures are measured, with noise of half the deviation of an architecture."""
    ranks = []
    for seed in range(8):
        search = planted(MeasuredSettings(stages=((60, 1),), balanced=0.33), seed)
        total = BENCH.all_decisions()[0].n_candidates ** 6
        every = np.stack(np.unravel_index(np.arange(total), (5,) * 6), 1) + 5 * np.arange(6)
        truth = search.truth[every].sum(1)
        found = search.score(search._best)
        ranks.append(1 + int((truth > found + 1e-9).sum()))
    # Chance has a median of 7,812; the best 1 % are 156.
    assert np.median(ranks) <= 60
    assert max(ranks) <= 1500


def test_the_result_has_the_highest_posterior_mean() -> None:
    search = planted(MeasuredSettings(stages=((30, 1),)), seed=3, space=CellSpace(n_nodes=2))
    assert search.posterior is not None
    assert search._best == best_architecture(search.space, search.posterior.mean)
    means = coded(search.space, [search._best, search.measurements[0].kept]) @ search.posterior.mean
    assert means[0] >= means[1]
    for node in search._report(search._best).nodes:
        assert min(node.magnitudes) == 0
        order = np.argsort(node.magnitudes)[::-1][:2]
        candidates = next(
            d for d in search.decisions if (d.kind, d.index) == (node.cell, node.node)
        ).candidates
        assert {f"{op}<-{state}" for op, state in (candidates[c] for c in order)} == set(node.picks)


LIMITED_SIZE = NetworkSize(8, 5, 10)


def cost_of(genotype: Genotype) -> Cost:
    return BENCH.cost(genotype, LIMITED_SIZE, (3, 16, 16))


def limited(seed: int = 0, kind: Any = Planted, **changes: Any) -> Any:
    """Return a search whose limits are those of another network than the one that it trains."""
    settings = replace(MeasuredSettings(stages=((24, 1),), calibration_batches=0), **changes)
    net = ArchitectureNetwork(BENCH, NetworkSize(2, 5, 5, in_channels=1))
    return kind(net, settings, CPU, seed, None, cost_of, costs_in)


def costs_in(unit: Any, total: bool) -> Any:
    return candidate_costs(BENCH, LIMITED_SIZE, (3, 16, 16), unit, total=total)


@pytest.fixture(scope="module")
def macs_of_all() -> dict[Architecture, int]:
    """The multiply-adds of all 15,625 architectures: those of the candidates, and of the rest of the network."""
    costs = np.concatenate(costs_in("macs", True)["cell"])
    example = architecture(BENCH, BENCH.random_supports(0))
    rest = cost_of(BENCH.random(0)).macs - costs[list(example)].sum()
    every = itertools.product(*(range(5 * edge, 5 * edge + 5) for edge in range(6)))
    return {kept: round(rest + costs[list(kept)].sum()) for kept in every}


@pytest.mark.parametrize("max_concurrent", [1, 3])
def test_only_architectures_within_the_limits_are_measured_and_chosen(
    max_concurrent: int, macs_of_all: dict[Architecture, int]
) -> None:
    """The result has the highest posterior mean of all architectures of the space within the limit."""
    limit = int(np.quantile(list(macs_of_all.values()), 0.3))
    search = limited(max_macs=limit, max_concurrent=max_concurrent)
    costs = np.concatenate(costs_in("macs", True)["cell"])
    search.truth = search.truth + 5.0 * costs / costs.max()  # What costs more is better.
    while not search.is_done:
        if max_concurrent == 1:
            search.train_epoch([], None, 0)
            search.validate_epoch(None)
            search.finish_epoch()
        else:
            drawn = [search.draw() for _ in range(max_concurrent)]
            for planned in drawn[::-1]:
                search.receive(planned, Metrics(math.exp(-search.score(planned.kept)), 0.0, 1))
    measured = [m.kept for m in search.measurements]
    assert all(cost_of(search.space.genotype(supports_of(BENCH, kept))).macs <= limit for kept in measured)
    assert len(set(measured)) == 24
    inside = [kept for kept, macs in macs_of_all.items() if macs <= limit]
    means = search.posterior.mean[np.array(inside)].sum(1)
    assert search._best == inside[int(np.argmax(means))]
    assert search._best != best_architecture(BENCH, search.posterior.mean), "the limit has an effect"
    summary = summary_of(BENCH, search.measurements, 0, search.limits.budget())
    assert summary is not None
    assert summary.best == search._best
    assert all(macs_of_all[kept] <= limit for kept, _, _ in summary.following)


def test_limits_that_leave_too_few_architectures_are_refused(macs_of_all: dict[Architecture, int]) -> None:
    least = min(macs_of_all.values())
    there = sum(macs == least for macs in macs_of_all.values())
    with pytest.raises(ConfigError, match=r"max_macs: 1,000 is below the cheapest architecture, which has"):
        limited(max_macs=1000)
    few = f"stages: {there + 1} measurements of 1 epoch of 5 layers, and {there} architectures are within the limits"
    with pytest.raises(ConfigError, match=f"{few}; raise"):
        limited(max_macs=least, stages=((there + 1, 1),))


def test_it_stops_when_an_improvement_is_improbable() -> None:
    settings = MeasuredSettings(stages=((200, 1),), stop_probability=0.5, stop_margin=1.0)
    search = planted(settings, seed=0)
    assert 60 <= len(search.measurements) < 200
    assert search.metrics()["measured/count"] == len(search.measurements)


# ---------- what is reported


def test_reported_effects_cover_planted_ones() -> None:
    """Intervals of 95 % after adaptive measurements, over the 30 effects of 5 searches."""
    covered, kept = [], []
    for seed in range(5):
        search = planted(MeasuredSettings(stages=((60, 1),), balanced=0.33), seed)
        summary = summary_of(BENCH, search.measurements, search.seed)
        assert summary is not None
        assert summary.best == search._best
        deviation = np.std([-math.log(m.loss) for m in search.measurements])  # the unit of a score
        truth = sum_to_zero(BENCH, search.truth) / deviation
        covered.append((summary.intervals[:, 0] <= truth) & (truth <= summary.intervals[:, 1]))
        right = [int(np.argmax(search.truth[part])) + part.start for part in layout(BENCH).parts()]
        kept.append([(p, c in right) for p, c in zip(summary.choices, summary.best, strict=True)])
    assert 0.9 <= np.mean(covered) <= 0.99
    # A choice is right about as often as its probability says.
    probability, right_choice = np.array(kept, dtype=float).reshape(-1, 2).T
    assert abs(probability.mean() - right_choice.mean()) < 0.12


def test_the_metrics_of_a_measurement_are_those_of_its_last_epoch() -> None:
    search = make(MeasuredSettings(stages=((2, 1), (2, 2))), BENCH, 0, Planted)
    seen = []
    while not search.is_done:
        before, current = search.posterior, search.current.kept
        search.train_epoch([], None, 0)
        if search.is_measured:
            search.validate_epoch(None)
        search.finish_epoch()
        seen.append(search.metrics())
        assert ("measured/predicted" in seen[-1]) == (before is not None and "measured/epochs" in seen[-1])
        if "measured/predicted" in seen[-1]:
            (row,) = coded(BENCH, [current])
            assert seen[-1]["measured/predicted"] == pytest.approx(float(row @ before.mean))
            deviation = math.sqrt(row @ before.covariance @ row)
            assert seen[-1]["measured/predicted_deviation"] == pytest.approx(deviation)
    assert [m.get("measured/epochs") for m in seen] == [1, 1, None, 2, None, 2]
    assert [m["measured/count"] for m in seen] == [1, 2, 2, 3, 3, 4]
    summary = summary_of(BENCH, search.measurements, search.seed)
    assert summary is not None
    assert seen[-1]["measured/certain_choices"] == count_certain(summary.choices)
    assert seen[-1]["measured/expected_improvement"] == pytest.approx(summary.improvement.expected)


def test_there_are_no_effects_without_more_measurements_than_fidelities() -> None:
    search = planted(MeasuredSettings(stages=((1, 1),)), seed=0)
    assert summary_of(BENCH, search.measurements, 0) is None
    assert search.posterior is None
