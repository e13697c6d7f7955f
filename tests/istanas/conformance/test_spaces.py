"""What every search space must satisfy. A new space is tested by adding one line to `CASES`."""

import copy
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from istanas.measure import Cost, count_macs, count_params
from istanas.nets import NodeState, SearchNetwork, absorb_into_batchnorm
from istanas.space import (
    CellSpace,
    ChoiceSpace,
    Decision,
    Genotype,
    NasBench201Space,
    NetworkSize,
    SearchSpace,
)
from istanas.space.choice import Choose


@dataclass(frozen=True)
class ChainSpace(ChoiceSpace):
    """Three blocks of the same two decisions, which keep two candidates and one candidate of registered operations.

    Args:
        kernels: Sides of the convolutions.
    """

    name: ClassVar[str] = "chain"

    kernels: tuple[int, ...] = (1, 3, 5)

    def make_decisions(self) -> list[Decision]:
        sides = tuple((f"conv{kernel}", 0) for kernel in self.kernels)
        registered = tuple((op, 0) for op in ("skip_connect", "sep_conv_3x3", "max_pool_3x3"))
        return [
            Decision("wide", 0, sides, sparsity=2),
            Decision("block", 0, registered, sparsity=1),
            Decision("block", 1, registered, sparsity=1),
        ]

    def network(self, size: NetworkSize, choose: Choose) -> nn.Module:
        c = size.init_channels

        def build(operation: str, affine: bool) -> nn.Module:
            kernel = int(operation.removeprefix("conv"))
            layer = nn.Conv2d(size.in_channels, c, kernel, padding=kernel // 2, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(c, affine=affine))

        parts = [choose("wide", 0, c, build)]
        for _ in range(size.layers):
            parts += [choose.operation("block", 0, c), choose.operation("block", 1, c, stride=2)]
        return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, size.num_classes))


@dataclass(frozen=True)
class Case:
    """A space, and a small network in it.

    Args:
        space: The space.
        layers: Number of layers of the network, such that the space has one of this size.
    """

    space: SearchSpace
    layers: int

    def size(self, op_batchnorm: bool = False) -> NetworkSize:
        return NetworkSize(4, self.layers, 5, in_channels=3, op_batchnorm=op_batchnorm)

    def supernet(self, op_batchnorm: bool = False) -> SearchNetwork:
        torch.manual_seed(0)
        net = self.space.supernet(
            self.size(op_batchnorm), lambda decision: decision.n_candidates, auxiliary=False, partial=1
        )
        net = net.double()
        with torch.no_grad():
            for b in net.alphas():
                b.uniform_(0.5, 1.5)
        return net

    def target(self, seed: int) -> Any:
        torch.manual_seed(seed)
        return self.space.target(self.space.random(seed), self.size()).double()


CASES = {
    "darts": Case(CellSpace(n_nodes=2), layers=3),
    "darts, one operation an edge": Case(CellSpace(n_nodes=2, one_op_per_edge=True), layers=3),
    "nas_bench_201": Case(NasBench201Space(), layers=5),
    "chain": Case(ChainSpace(), layers=2),
}
SEEDS = range(3)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    found = request.param
    assert isinstance(found, Case)
    return found


def pictures(seed: int = 0, count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def install(net: SearchNetwork, supports: dict[str, list[tuple[int, ...]]], state: NodeState) -> None:
    """Make candidates active, each with its own alpha as its edge weight."""

    def weigh(kind: str, alphas: Sequence[Tensor]) -> list[Tensor]:
        return [b[list(kept)] for b, kept in zip(alphas, supports[kind], strict=True)]

    net.install(supports, weigh, {kind: [state] * len(each) for kind, each in supports.items()})


def loss_of(net: Any, seed: int = 0) -> Tensor:
    logits, _ = net.forward_with_auxiliary(pictures(seed))
    return F.cross_entropy(logits, torch.arange(4))


# ---------- decisions and genotypes
def test_there_are_decisions_with_candidates(case: Case) -> None:
    decisions = case.space.all_decisions()
    assert decisions
    assert {decision.kind for decision in decisions} == set(case.space.kinds)
    for decision in decisions:
        assert 1 <= decision.sparsity <= decision.n_candidates
        assert len(decision.edges) == decision.n_candidates
    case.space.check_size(case.size())


def test_equal_spaces_are_equal_and_survive_pickling(case: Case) -> None:
    copied = pickle.loads(pickle.dumps(case.space))
    assert copied == case.space
    assert hash(copied) == hash(case.space)
    assert copied.all_decisions() == case.space.all_decisions()


def test_random_genotypes_are_members_and_given_by_the_seed(case: Case) -> None:
    drawn = [case.space.random(seed) for seed in range(20)]
    for genotype in drawn:
        case.space.check(genotype)
        assert genotype.space == case.space.name
    assert drawn == [case.space.random(seed) for seed in range(20)]
    assert len({genotype.digest() for genotype in drawn}) > 5


def test_every_candidate_is_drawn(case: Case) -> None:
    drawn = [case.space.supports(case.space.random(seed)) for seed in range(200)]
    for kind, decisions in case.space.decisions.items():
        for index, decision in enumerate(decisions):
            seen = {c for supports in drawn for c in supports[kind][index]}
            assert seen == set(range(decision.n_candidates))


@pytest.mark.parametrize("seed", SEEDS)
def test_supports_and_genotypes_are_inverse(case: Case, seed: int) -> None:
    supports = case.space.random_supports(seed)
    genotype = case.space.genotype(supports)
    assert case.space.supports(genotype) == supports
    assert case.space.genotype(case.space.supports(genotype)) == genotype


@pytest.mark.parametrize("seed", SEEDS)
def test_genotypes_survive_json_and_text(case: Case, seed: int) -> None:
    genotype = case.space.random(seed)
    assert Genotype.from_json(genotype.to_json()) == genotype
    for text in (case.space.text(genotype), case.space.reference(genotype)):
        assert text is None or case.space.parse(text) == genotype
    assert str(genotype).strip()


# ---------- networks
@pytest.mark.parametrize("seed", SEEDS)
def test_an_absorbed_supernet_equals_its_target_network(case: Case, seed: int) -> None:
    net = case.supernet(op_batchnorm=True)
    supports = case.space.random_supports(seed)
    for state in (NodeState.ACTIVE, NodeState.FROZEN):
        install(net, supports, state)
        optimizer = torch.optim.SGD(net.parameters(), 0.02)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            optimizer.step()
    net.eval()
    before = copy.deepcopy(net.state_dict())
    target = absorb_into_batchnorm(net)
    with torch.no_grad():
        logits, absorbed = net(pictures(9)), target(pictures(9))
    assert logits.std(0).max() > 1e-6 or "none" in str(net.genotype())
    assert (logits - absorbed).abs().max() <= 1e-5
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("state", NodeState)
def test_active_parameters_are_those_with_gradients(case: Case, seed: int, state: NodeState) -> None:
    net = case.supernet(op_batchnorm=state is NodeState.FROZEN)
    install(net, case.space.random_supports(seed), state)
    target = case.target(seed)
    for each, active in (
        (net, [*net.active_parameters(), *net.active_alphas()]),
        (target, target.active_parameters()),
    ):
        loss_of(each).backward()
        with_gradient = {name for name, p in each.named_parameters() if p.grad is not None}
        names = {id(p): name for name, p in each.named_parameters()}
        assert {names[id(p)] for p in active} == with_gradient
        assert len(active) == len(with_gradient) > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_inactive_operations_do_not_run(case: Case, seed: int) -> None:
    """Their weights may be anything, even NaN, and their statistics do not move."""
    net = case.supernet()
    install(net, case.space.random_supports(seed), NodeState.ACTIVE)
    expected = [copy.deepcopy(net)(pictures()), loss_of(copy.deepcopy(net))]
    active = {id(t) for t in (*net.active_parameters(), *net.active_buffers(), *net.alphas())}
    inactive = [p for p in net.parameters() if id(p) not in active]
    assert inactive
    ran = []
    for module in net.modules():
        own = list(module.parameters(recurse=False))
        if own and all(id(p) not in active for p in own):
            module.register_forward_hook(lambda module, *_: ran.append(module))
    with torch.no_grad():
        for p in inactive:
            p.fill_(torch.nan)
    idle = [b.clone() for b in net.buffers() if b.is_floating_point() and id(b) not in active]
    moving = [b.clone() for b in net.active_buffers()]
    assert torch.equal(net(pictures()), expected[0])
    assert not ran
    after = [b for b in net.buffers() if b.is_floating_point() and id(b) not in active]
    assert all(torch.equal(old, new) for old, new in zip(idle, after, strict=True))
    assert any(not torch.equal(old, new) for old, new in zip(moving, net.active_buffers(), strict=True))


@pytest.mark.parametrize("op_batchnorm", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_cost_is_that_of_the_network(case: Case, seed: int, op_batchnorm: bool) -> None:
    genotype, size = case.space.random(seed), case.size(op_batchnorm)
    net = case.space.target(genotype, size)
    shape = (3, 18, 18)
    assert case.space.cost(genotype, size, shape) == Cost(count_params(net), count_macs(net, shape))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_checkpointing_changes_no_bit(case: Case, seed: int, drop_path: float) -> None:
    net = case.supernet()
    install(net, case.space.random_supports(seed), NodeState.ACTIVE)
    for each in (net, case.target(seed)):
        each.drop_path_prob = drop_path
        found = []
        for on in (False, True):
            copied = copy.deepcopy(each)
            if isinstance(copied, SearchNetwork):
                install(copied, case.space.random_supports(seed), NodeState.ACTIVE)
            copied.activation_checkpointing = on
            torch.manual_seed(0)
            loss_of(copied).backward()
            gradients = {name: p.grad for name, p in copied.named_parameters() if p.grad is not None}
            found.append((gradients, dict(copied.named_buffers())))
        (plain, statistics), (again, again_statistics) = found
        assert plain.keys() == again.keys()
        assert all(torch.equal(gradient, again[name]) for name, gradient in plain.items())
        assert all(torch.equal(value, again_statistics[name]) for name, value in statistics.items())


def test_the_names_of_weights_do_not_depend_on_the_state(case: Case) -> None:
    """Checkpoints and trained networks are loaded by these names."""
    net = case.supernet()
    names = list(net.state_dict())
    for seed in SEEDS:
        install(net, case.space.random_supports(seed), NodeState.FROZEN)
        loss_of(net).backward()
        assert list(net.state_dict()) == names
        target = case.target(seed)
        loss_of(target).backward()
        with torch.device("meta"):
            blank = case.space.target(case.space.random(seed), case.size())
        assert list(target.state_dict()) == list(blank.state_dict())
        fresh = case.space.target(case.space.random(seed), case.size()).double()
        fresh.load_state_dict(target.state_dict())
        assert torch.equal(fresh.eval()(pictures()), target.eval()(pictures()))


# ---------- figures and files
@pytest.mark.parametrize("seed", SEEDS)
def test_the_drawing_has_every_pick(case: Case, seed: int) -> None:
    genotype = case.space.random(seed)
    drawings = case.space.drawing(genotype)
    assert set(drawings) == set(case.space.kinds)
    for kind, drawing in drawings.items():
        drawn = Counter((decision, at, op) for _, _, op, decision, at in drawing.edges if op is not None)
        picks = genotype.picks(kind)
        assert drawn == Counter(
            (i, at, op) for i, node in enumerate(picks) for at, (op, _) in enumerate(node)
        )
        assert all(0 <= source < target < len(drawing.states) for source, target, *_ in drawing.edges)
        assert drawing.ends <= set(range(len(drawing.states)))
        assert all((op is None) == (decision == at == -1) for _, _, op, decision, at in drawing.edges)


def test_an_exported_program_computes_the_same(case: Case) -> None:
    net = case.target(1).float().eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (pictures().float(),), dynamic_shapes={"x": {0: batch}})
    x = pictures(5, count=7).float()
    with torch.no_grad():
        assert (program.module()(x) - net(x)).abs().max() <= 1e-5
