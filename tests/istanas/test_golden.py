"""Networks compared with numbers of the authors' published implementation (golden files; skipped if absent).

Float64 agreement is asked for in relative norm: only mistakes differ by 1e-9. Float32 logits agree to 1e-5.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from istanas.measure import Cost, count_macs, count_params, target_cost
from istanas.nets import NodeCode, NodeState, Supernet, TargetNet, to_channels_last
from istanas.search import OneStageSearch, OneStageSettings
from istanas.space import CELLS, PUBLISHED, CellSpace
from istanas.sparse import recover_nodes, top_support
from istanas.training import Compute

Arrays = dict[str, npt.NDArray[Any]]


def load(path: Path) -> tuple[Arrays, dict[str, Tensor]]:
    """Return the golden arrays, and the weights among them in the published key layout."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    state = {k.removeprefix("param/"): torch.tensor(v) for k, v in arrays.items() if k.startswith("param/")}
    return arrays, state


def relative(ours: Any, theirs: Any) -> float:
    ours = ours.detach().double().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


# --- the target network ---

TARGETS = [("target_twostage", "ISTA_twostage", False), ("target_onestage", "ISTA_onestage", True)]


@pytest.mark.parametrize(("file", "cell", "op_batchnorm"), TARGETS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_target_logits(
    golden_dir: Path,
    file: str,
    cell: str,
    op_batchnorm: bool,
    channels_last: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    golden, state = load(golden_dir / f"{file}.npz")
    net = TargetNet(PUBLISHED[cell], 4, 5, 10, op_batchnorm=op_batchnorm)
    net.load_darts_state_dict(state)
    net.to(dtype).eval()
    if channels_last:
        to_channels_last(net)
    logits = net(torch.tensor(golden["input"]).to(dtype))
    assert relative(logits, golden["eval_logits"]) < tolerance
    assert np.abs(logits.detach().double().numpy() - golden["eval_logits"]).max() < tolerance


def test_the_order_of_picks_matters_to_trained_weights(golden_dir: Path) -> None:
    """The golden test can fail: if two picks of one kind are exchanged, the same weights give other logits."""
    golden, state = load(golden_dir / "target_twostage.npz")
    cell = PUBLISHED["ISTA_twostage"]
    reduce = list(cell.reduce)
    reduce[3] = (("dil_conv_5x5", 1), ("sep_conv_5x5", 4))
    net = TargetNet(type(cell)(cell.normal, tuple(reduce)), 4, 5, 10)
    net.load_darts_state_dict(state)
    logits = net.double().eval()(torch.tensor(golden["input"]).double())
    assert relative(logits, golden["eval_logits"]) > 1e-3


# --- the supernet ---

SUPERNETS = [("supernet_twostage", False), ("supernet_onestage", True)]


def golden_supernet(
    golden_dir: Path, file: str, op_batchnorm: bool, dtype: torch.dtype, codes: str
) -> tuple[Arrays, Supernet]:
    """Return the golden supernet with the golden codes, or with those recovered from the golden A and b."""
    golden, state = load(golden_dir / f"{file}.npz")
    for cell in CELLS:  # The state dict of the one-stage file does not contain b.
        state.setdefault(f"alphas_{cell}_", torch.tensor(golden[f"b_{cell}"]))
    space = CellSpace()
    net = Supernet(space, 4, 5, 10, op_batchnorm=op_batchnorm).to(dtype)
    net.load_darts_state_dict(state)
    with torch.no_grad():
        for cell in CELLS:
            for ours, theirs in zip(net.node_alphas(cell), torch.tensor(golden[f"b_{cell}"]), strict=True):
                ours.copy_(theirs)
    installed = {}
    for cell in CELLS:
        matrices = [torch.tensor(golden[f"A_{cell}/{node}"]) for node in range(4)]
        if codes == "recovered":
            results = recover_nodes(matrices, torch.tensor(golden[f"b_{cell}"]))
            zs = [torch.as_tensor(result.z) for result in results]
        else:
            zs = [torch.tensor(golden[f"z_{cell}/{node}"]) for node in range(4)]
        supports = [tuple(int(i) for i in top_support(z, space.sparsity)) for z in zs]
        installed[cell] = [NodeCode(*node) for node in zip(matrices, zs, supports, strict=True)]
    net.install_codes(installed)
    return golden, net.train()


@pytest.mark.parametrize(("file", "op_batchnorm"), SUPERNETS)
@pytest.mark.parametrize("codes", ["golden", "recovered"])
def test_supernet_in_float64(golden_dir: Path, file: str, op_batchnorm: bool, codes: str) -> None:
    """Edge weights, training logits, loss, and gradients of b and of the stem agree to 1e-9 in relative norm."""
    golden, net = golden_supernet(golden_dir, file, op_batchnorm, torch.float64, codes)
    # The golden z is a minimiser up to about 1e-10, so that its alphas and ours may differ by this much.
    space = net.space
    for cell, nodes in net.edge_weights().items():
        alphas = np.zeros((space.n_edges, space.n_ops))
        for node, weights in enumerate(nodes):
            for candidate, weight in zip(net._supports[cell][node], weights.tolist(), strict=True):
                state, op = space.split(candidate)
                alphas[space.edge(node, state), op] = weight
        assert relative(alphas, golden[f"alpha_{cell}"]) < 1e-9
    logits = net(torch.tensor(golden["input"]).double())
    loss = F.cross_entropy(logits, torch.tensor(golden["target"]))
    loss.backward()
    assert relative(logits, golden["train_logits"]) < 1e-9
    assert relative(loss, golden["loss"]) < 1e-9
    for cell in CELLS:
        gradients = torch.stack([b.grad for b in net.node_alphas(cell) if b.grad is not None])
        assert relative(gradients, golden[f"grad_b_{cell}"]) < 1e-9
    assert relative(net.stem.stem[0].weight.grad, golden["grad_stem"]) < 1e-9


@pytest.mark.parametrize(("file", "op_batchnorm"), SUPERNETS)
def test_supernet_logits_in_float32(golden_dir: Path, file: str, op_batchnorm: bool) -> None:
    golden, net = golden_supernet(golden_dir, file, op_batchnorm, torch.float32, "recovered")
    logits = net(torch.tensor(golden["input"]))
    assert relative(logits, golden["train_logits"]) < 1e-5
    assert np.abs(logits.detach().double().numpy() - golden["train_logits"]).max() < 1e-5


# --- exact counts (the figures of the golden README; no file needed) ---


@pytest.mark.parametrize(
    ("cell", "settings", "shape", "params"),
    [
        ("ISTA_twostage", (36, 20, 10), (3, 32, 32), 3_316_726),
        ("ISTA_onestage", (36, 20, 10), (3, 32, 32), 3_371_806),
        ("ISTA_ImageNet", (48, 14, 1000), (3, 224, 224), 5_651_392),
    ],
)
def test_published_counts(
    cell: str, settings: tuple[int, int, int], shape: tuple[int, int, int], params: int
) -> None:
    stem = "imagenet" if cell == "ISTA_ImageNet" else "cifar"
    options: dict[str, Any] = {"stem": stem, "op_batchnorm": cell == "ISTA_onestage"}
    net = TargetNet(PUBLISHED[cell], *settings, auxiliary=True, **options)
    macs = count_macs(net, shape)
    assert count_params(net) == params
    if cell == "ISTA_ImageNet":
        assert round(macs / 1e6, 1) == 621.1
    if cell == "ISTA_twostage":
        assert sum(p.numel() for p in net.parameters()) == 3_793_152
    channels, layers, classes = settings
    cost = target_cost(
        PUBLISHED[cell], init_channels=channels, layers=layers, num_classes=classes, shape=shape, **options
    )
    assert (cost.params, cost.macs) == (params, macs)


def test_search_network_count() -> None:
    net = Supernet(CellSpace(), 16, 8, 10)
    assert count_params(net) == 1_930_674
    assert sum(b.numel() for b in net.alphas()) == 56
    assert sum(w.numel() for w in net.weights()) == 1_930_674 - 56


# --- four joint steps of the one-stage search ---


def published_key(name: str) -> str:
    """Return the published name of a tensor of our supernet."""
    name = re.sub(r"^stem\.(stem[01]?)\.", r"\1.", name)
    return re.sub(r"^(cells\.\d+\.)ops\.(\d+)\.(\d+)\.", r"\1_ops.\2._ops.\3.", name)


@pytest.mark.parametrize("which", ["active", "frozen"])
def test_four_one_stage_steps(golden_dir: Path, which: str) -> None:
    """All weights, alphas and running statistics after four steps agree in float64.

    While a node is ACTIVE no batch norm inside its operations is trained; in the second file some nodes are FROZEN.
    """
    with np.load(golden_dir / f"onestage_steps_{which}.npz") as file:
        golden = {key: file[key] for key in file.files}
    net = Supernet(CellSpace(), 2, 4, 10, op_batchnorm=True)
    settings = OneStageSettings(
        lr=0.025, weight_decay=3e-4, arch_lr=3e-4, arch_weight_decay=1e-3, grad_clip=5.0
    )
    net.double()
    search = OneStageSearch(net, settings, Compute(torch.device("cpu")), 0, cost=lambda _: Cost(1, 1))
    start = {k.removeprefix("start/"): torch.tensor(v) for k, v in golden.items() if k.startswith("start/")}
    net.load_darts_state_dict(start)
    codes, states = {}, {}
    for cell in CELLS:
        for node in range(4):
            z = torch.tensor(golden[f"z_{cell}/{node}"]).double()
            support = tuple(int(i) for i in top_support(z, 2))
            codes[cell, node] = NodeCode(torch.tensor(golden[f"A_{cell}/{node}"]), z, support)
        states[cell] = [
            NodeState.FROZEN if frozen else NodeState.ACTIVE for frozen in golden[f"frozen_{cell}"]
        ]
    search.install(codes, states)
    batches = [
        (torch.tensor(images).double(), torch.tensor(targets))
        for images, targets in zip(golden["inputs"], golden["targets"], strict=True)
    ]
    metrics = search.train_epoch(batches, None, len(batches))

    assert abs(metrics.loss - golden["mean_loss"]) < 1e-9 * golden["mean_loss"]
    end = {k.removeprefix("end/"): v for k, v in golden.items() if k.startswith("end/")}
    state = net.state_dict()
    ours = {published_key(k): v for k, v in state.items() if not k.startswith("compressed_alphas")}
    ours |= {f"alphas_{cell}_": torch.stack([*net.node_alphas(cell)]).detach() for cell in CELLS}
    ours = {k: v for k, v in ours.items() if not k.endswith("num_batches_tracked")}
    assert ours.keys() == end.keys()
    # The published code also computes blocks that no kept operation reads. This changes their running statistics, but
    # no gradient.
    computed = {id(t) for t in [*net.active_buffers(), *net.parameters()]}
    skipped = {published_key(name) for name, t in net.named_buffers() if id(t) not in computed}
    moved = 0
    for name, value in end.items():
        before = start[name].double().numpy()
        if name in skipped:
            assert np.array_equal(ours[name].numpy(), before), name
            continue
        difference = float(np.linalg.norm(ours[name].numpy() - value))
        assert difference <= 1e-9 * max(1.0, float(np.linalg.norm(value))), name
        moved += not np.array_equal(value, before)
    assert moved > 100
