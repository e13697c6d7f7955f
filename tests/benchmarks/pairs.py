"""Pairs of our networks and steps and the reference's, with the same weights, codes and batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from istanas.measure import Cost
from istanas.nets import NodeCode, Supernet, TargetNet, to_channels_last
from istanas.search import OneStageSearch, OneStageSettings, TwoStageSearch, TwoStageSettings
from istanas.search.sparse_coding import draw_matrices
from istanas.space import CELLS, CellSpace, Genotype
from istanas.training import Compute, Totals, train_target_epoch
from tests.benchmarks import reference

CPU = Compute(torch.device("cpu"))
Supports = dict[str, list[tuple[int, ...]]]
Codes = dict[str, list[NodeCode]]
Batch = tuple[Tensor, Tensor]


def random_batch(n: int, size: int, seed: int, dtype: torch.dtype = torch.float32) -> Batch:
    """Return normalised pictures (n, 3, size, size) and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(10, (n,), generator=generator)


def ours_of(batch: Batch) -> Batch:
    """Return the batch in the layout of our loader."""
    return batch[0].contiguous(memory_format=torch.channels_last), batch[1]


def random_supports(space: CellSpace, seed: int, kinds: Sequence[int] | None = None) -> Supports:
    """Draw distinct candidates per cell and node, of all kinds of operations or of some."""
    generator = torch.Generator().manual_seed(seed)
    chosen: Supports = {}
    for cell in CELLS:
        chosen[cell] = []
        for node in range(space.n_nodes):
            candidates = torch.tensor(
                [c for c in range(space.n_candidates(node)) if kinds is None or c % space.n_ops in kinds]
            )
            order = torch.randperm(len(candidates), generator=generator)[: space.sparsity]
            chosen[cell].append(tuple(sorted(candidates[order].tolist())))
    return chosen


def codes_of(space: CellSpace, supports: Supports, seed: int) -> Codes:
    """Return codes with these supports and random values."""
    generator = torch.Generator().manual_seed(seed)
    codes = {}
    for cell, matrices in draw_matrices(space, 7, "uniform", seed).items():
        values = [torch.randn(A.shape[1], generator=generator, dtype=torch.float64) for A in matrices]
        codes[cell] = [NodeCode(*each) for each in zip(matrices, values, supports[cell], strict=True)]
    return codes


def random_codes(seed: int) -> Codes:
    """Return the codes of a random active set."""
    return codes_of(CellSpace(), random_supports(CellSpace(), seed), seed)


def make_search(
    c: int,
    layers: int,
    codes: Codes,
    *,
    one_stage: bool = False,
    auxiliary: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Return our search with these codes installed."""
    torch.manual_seed(seed)
    net = Supernet(CellSpace(), c, layers, 10, op_batchnorm=one_stage, auxiliary=auxiliary).to(dtype)
    search: Any
    if one_stage:
        settings = OneStageSettings(lr=0.025, arch_lr=3e-4, auxiliary_weight=0.4 * auxiliary)
        search = OneStageSearch(net, settings, CPU, seed, cost=lambda genotype: Cost(0, 0))
    else:
        search = TwoStageSearch(net, TwoStageSettings(lr=0.025, arch_lr=3e-4), CPU, seed)
    search.install({(cell, node): codes[cell][node] for cell, node in search.places})
    with torch.no_grad():
        for b in net.alphas():
            b.normal_(0, 0.3)
    to_channels_last(net).train()
    return search


def make_reference(
    c: int,
    layers: int,
    codes: Codes,
    *,
    one_stage: bool = False,
    auxiliary: bool = False,
    dtype: torch.dtype = torch.float32,
) -> reference.Optimizers:
    """Return the reference's network with these codes and its optimisers."""
    net = reference.Supernet(c, layers, one_stage=one_stage, auxiliary=auxiliary).to(dtype)
    net.codes = codes
    return reference.Optimizers(net)


def two_stage_step(search: TwoStageSearch, batch: Batch, alpha_batch: Batch) -> None:
    """Run our step."""
    search.alpha_step(alpha_batch)
    search.weight_step(batch, Totals(CPU.device))


class Pair:
    """Our search and the reference's in the same state."""

    def __init__(
        self,
        c: int,
        layers: int,
        *,
        one_stage: bool = False,
        auxiliary: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        codes = random_codes(seed)
        kind: dict[str, Any] = {"one_stage": one_stage, "auxiliary": auxiliary, "dtype": dtype}
        self.search = make_search(c, layers, codes, seed=seed, **kind)
        self.net = self.search.supernet
        self.optimizers = make_reference(c, layers, codes, **kind)
        self.reference = self.optimizers.net
        self.reference.load_state_dict(self.net.state_dict())
        if one_stage:  # where an operation ends, the affine part is fixed while its node is ACTIVE
            names = {name for name, p in self.net.named_parameters() if not p.requires_grad}
            for name, p in self.reference.named_parameters():
                p.requires_grad_(name not in names)

    def our_step(self, batch: Batch, alpha_batch: Batch | None = None) -> None:
        """Run our step on batches from `ours_of`."""
        if alpha_batch is None:
            self.search.step(batch, Totals(CPU.device))
        else:
            two_stage_step(self.search, batch, alpha_batch)

    def their_step(self, batch: Batch, alpha_batch: Batch | None = None) -> None:
        if alpha_batch is None:
            reference.one_stage_step(self.optimizers, batch)
        else:
            reference.two_stage_step(self.optimizers, batch, alpha_batch)


class TargetPair:
    """Our retraining and the reference's in the same state."""

    def __init__(
        self,
        genotype: Genotype,
        c: int,
        layers: int,
        *,
        auxiliary: bool = True,
        op_batchnorm: bool = False,
        drop_path: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        options = {"auxiliary": auxiliary, "op_batchnorm": op_batchnorm}
        self.net = to_channels_last(TargetNet(genotype, c, layers, 10, **options).to(dtype)).train()
        self.reference = reference.TargetNet(genotype, c, layers, **options).to(dtype)
        self.reference.load_state_dict(self.net.state_dict())
        self.net.drop_path_prob = self.reference.drop_path_prob = drop_path
        self.ours, self.theirs = (
            torch.optim.SGD(net.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
            for net in (self.net, self.reference)
        )

    def our_step(self, batch: Batch) -> None:
        train_target_epoch(
            self.net,  # type: ignore[arg-type]
            self.ours,
            [batch],
            CPU,
            lr_at=lambda step: 0.025,
            auxiliary_weight=0.4,
            label_smoothing=0.0,
            grad_clip=5.0,
        )

    def their_step(self, batch: Batch) -> None:
        reference.retrain_step(self.reference, self.theirs, batch)
