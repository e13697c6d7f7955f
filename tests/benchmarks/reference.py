"""The reference for our networks and steps: a literal implementation of the published description.

It uses plain modules of torch in NCHW, checks for every candidate operation of an edge whether its weight is 0, and
computes all gradients of a step for one optimiser. No waste is added. Modules have the names of ours, so that weights
load by name.

Source: Liu et al., DARTS, ICLR 2019; Yang et al., ISTA-NAS, NeurIPS 2020.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from istanas.nets import NodeCode
from istanas.space import CELLS, PRIMITIVES, Genotype

NODES, MEASUREMENTS = 4, 7  # of a cell; of a node


# ---------- operations


def block(channels: int, kernel: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


class Named(nn.Module):
    """A sequence that is called `op`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.op = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Any:
        return self.op(x)


class FactorizedReduce(nn.Module):
    def __init__(self, c_in: int, c_out: int, affine: bool) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(c_in, c_out - c_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x: Tensor) -> Any:
        x = self.relu(x)
        if x.shape[2] % 2 or x.shape[3] % 2:  # the published block refuses odd sizes; we extend it by zeros
            x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


def operation(
    name: str, c: int, stride: int, affine: bool, pool_batchnorm: bool, skip_batchnorm: bool
) -> nn.Module:
    norm = nn.BatchNorm2d(c, affine=affine)
    if name in ("max_pool_3x3", "avg_pool_3x3"):
        pool: nn.Module = nn.MaxPool2d(3, stride, 1)
        if name == "avg_pool_3x3":
            pool = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        return nn.Sequential(pool, norm) if pool_batchnorm else pool
    if name == "skip_connect":
        if stride == 2:
            return FactorizedReduce(c, c, affine)
        return nn.Sequential(nn.Identity(), norm) if skip_batchnorm else nn.Identity()
    kernel = int(name[-1])
    if name.startswith("dil"):
        return Named(*block(c, kernel, stride, 2, affine))
    return Named(*block(c, kernel, stride, 1, affine), *block(c, kernel, 1, 1, affine))


def preprocess(c_in: int, c: int, affine: bool) -> nn.Module:
    return Named(nn.ReLU(), nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c, affine=affine))


def drop_path(x: Tensor, op: nn.Module, probability: float) -> Tensor:
    if probability > 0 and not isinstance(op, nn.Identity):
        keep = torch.empty(len(x), 1, 1, 1, dtype=x.dtype).bernoulli_(1 - probability)
        x = x / (1 - probability) * keep
    return x


# ---------- networks
class Stem(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Any:
        return self.stem(x)


class AuxiliaryHead(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride=3, count_include_pad=False),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, classes)

    def forward(self, x: Tensor) -> Any:
        return self.classifier(self.features(x).flatten(1))


class Network(nn.Module):
    """Stem, cells, classifier; `cell(kind, channels, c_prev_prev, c_prev, reduction_prev)` makes a cell."""

    def __init__(self, cell: Any, n_concat: Mapping[str, int], c: int, layers: int, auxiliary: bool) -> None:
        super().__init__()
        self.stem = Stem(3 * c)
        self.cells = nn.ModuleList()
        self.auxiliary_at = 2 * layers // 3
        c_prev_prev = c_prev = 3 * c
        reduction_prev = False
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            c *= 2 if reduction else 1
            kind = "reduce" if reduction else "normal"
            self.cells.append(cell(kind, c, c_prev_prev, c_prev, reduction_prev))
            c_prev_prev, c_prev = c_prev, n_concat[kind] * c
            reduction_prev = reduction
            if layer == self.auxiliary_at:
                self.auxiliary_head = AuxiliaryHead(c_prev, 10) if auxiliary else None
        self.classifier = nn.Linear(c_prev, 10)
        self.drop_path_prob = 0.0

    def run(self, x: Tensor, weights: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        s0 = s1 = self.stem(x)
        drop = self.drop_path_prob if self.training else 0.0
        auxiliary = None
        for i, cell in enumerate(self.cells):
            extra = (drop,) if weights is None else (drop, weights[cell.kind])
            s0, s1 = s1, cell(s0, s1, *extra)
            if i == self.auxiliary_at and self.auxiliary_head is not None and self.training:
                auxiliary = self.auxiliary_head(s1)
        return self.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1)), auxiliary


class SearchCell(nn.Module):
    def __init__(self, kind: str, c: int, c_pp: int, c_p: int, reduction_prev: bool, one_stage: bool) -> None:
        super().__init__()
        self.kind = kind
        affine = one_stage
        first = FactorizedReduce if reduction_prev else preprocess
        self.preprocess0, self.preprocess1 = first(c_pp, c, affine), preprocess(c_p, c, affine)
        self.ops = nn.ModuleList(
            nn.ModuleList(
                operation(name, c, 2 if kind == "reduce" and j < 2 else 1, affine, True, one_stage)
                for name in PRIMITIVES
            )
            for node in range(NODES)
            for j in range(2 + node)
        )

    def forward(self, s0: Tensor, s1: Tensor, drop: float, weights: Tensor) -> Tensor:
        """Weights (edges, ops): an operation whose weight is 0 is passed over."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        edge = 0
        for _ in range(NODES):
            terms = []
            for state in states:
                for weight, op in zip(weights[edge], self.ops[edge], strict=True):
                    if weight != 0:
                        terms.append(drop_path(weight * op(state), op, drop))
                edge += 1
            states.append(sum(terms))  # type: ignore[arg-type]
        return torch.cat(states[2:], dim=1)


class Supernet(Network):
    """Two-stage; with `one_stage`, batch norms with affine part, behind identities too."""

    def __init__(
        self,
        c: int,
        layers: int,
        *,
        one_stage: bool = False,
        auxiliary: bool = False,
    ) -> None:
        def cell(*arguments: Any) -> SearchCell:
            return SearchCell(*arguments, one_stage=one_stage)

        super().__init__(cell, dict.fromkeys(CELLS, NODES), c, layers, auxiliary)
        self.compressed_alphas = nn.ModuleDict(
            {
                kind: nn.ParameterList(nn.Parameter(torch.zeros(MEASUREMENTS)) for _ in range(NODES))
                for kind in CELLS
            }
        )
        self.codes: Mapping[str, Sequence[NodeCode]] = {}

    def edge_weights(self) -> dict[str, Tensor]:
        """alpha = A^T b - (A^T A - I) z on the support of the truncated z, 0 elsewhere; (edges, ops) a cell."""
        weights = {}
        for kind in CELLS:
            rows = []
            for b, code in zip(self.compressed_alphas[kind], self.codes[kind], strict=True):
                A, kept = (
                    code.measurement_matrix.to(b.dtype),
                    torch.zeros(len(code.sparse_code), dtype=b.dtype),
                )
                kept[list(code.support)] = 1.0
                z = code.sparse_code.to(b.dtype) * kept
                rows.append(kept * (A.T @ b - (A.T @ A - torch.eye(len(z), dtype=b.dtype)) @ z))
            weights[kind] = torch.cat(rows).view(-1, len(PRIMITIVES))
        return weights

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.run(x, self.edge_weights())

    def alphas(self) -> list[nn.Parameter]:
        return list(self.compressed_alphas.parameters())

    def weights(self) -> list[nn.Parameter]:
        alphas = {id(b) for b in self.alphas()}
        return [p for p in self.parameters() if id(p) not in alphas]


class DenseSupernet(Supernet):
    """First-order DARTS: every operation of every edge, weighted by a softmax over the edge's operations."""

    def __init__(self, c: int, layers: int) -> None:
        super().__init__(c, layers)
        edges = sum(2 + node for node in range(NODES))
        shape = (edges, len(PRIMITIVES))
        self.compressed_alphas = nn.ModuleDict()
        self.scores = nn.ParameterDict({kind: nn.Parameter(1e-3 * torch.randn(shape)) for kind in CELLS})

    def edge_weights(self) -> dict[str, Tensor]:
        return {kind: scores.softmax(-1) for kind, scores in self.scores.items()}

    def alphas(self) -> list[nn.Parameter]:
        return list(self.scores.parameters())


class TargetCell(nn.Module):
    def __init__(
        self,
        kind: str,
        c: int,
        c_pp: int,
        c_p: int,
        reduction_prev: bool,
        genotype: Genotype,
        op_batchnorm: bool,
    ) -> None:
        super().__init__()
        self.kind = kind
        first = FactorizedReduce if reduction_prev else preprocess
        self.preprocess0, self.preprocess1 = first(c_pp, c, True), preprocess(c_p, c, True)
        self.picks, self.concat = genotype.picks(kind), genotype.concat(kind)
        self.ops = nn.ModuleList(
            operation(name, c, 2 if kind == "reduce" and j < 2 else 1, True, op_batchnorm, op_batchnorm)
            for node in self.picks
            for name, j in node
        )

    def forward(self, s0: Tensor, s1: Tensor, drop: float) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        ops = iter(self.ops)
        for node in self.picks:
            terms = []
            for (_, j), op in zip(node, ops, strict=False):
                terms.append(drop_path(op(states[j]), op, drop))
            states.append(sum(terms))  # type: ignore[arg-type]
        return torch.cat([states[i] for i in self.concat], dim=1)


class TargetNet(Network):
    def __init__(
        self, genotype: Genotype, c: int, layers: int, *, auxiliary: bool = False, op_batchnorm: bool = False
    ) -> None:
        def cell(*arguments: Any) -> TargetCell:
            return TargetCell(*arguments, genotype=genotype, op_batchnorm=op_batchnorm)

        super().__init__(cell, {kind: len(genotype.concat(kind)) for kind in CELLS}, c, layers, auxiliary)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.run(x)


# ---------- steps
class Optimizers:
    """SGD with momentum for the weights, Adam for the alphas, of the published search."""

    def __init__(self, net: Supernet) -> None:
        self.net, self.weights = net, net.weights()
        self.sgd = torch.optim.SGD(self.weights, 0.025, momentum=0.9, weight_decay=3e-4)
        self.adam = torch.optim.Adam(net.alphas(), 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)

    def zero_grad(self) -> None:
        self.sgd.zero_grad()
        self.adam.zero_grad()

    def step_weights(self) -> None:
        nn.utils.clip_grad_norm_(self.weights, 5.0)
        self.sgd.step()


def two_stage_step(
    optimizers: Optimizers, batch: tuple[Tensor, Tensor], alpha_batch: tuple[Tensor, Tensor]
) -> None:
    """An Adam step on the alphas, then an SGD step on the weights; of a `DenseSupernet`, first-order DARTS's step."""
    optimizers.zero_grad()
    loss(optimizers.net(alpha_batch[0]), alpha_batch[1]).backward()
    optimizers.adam.step()
    optimizers.zero_grad()
    loss(optimizers.net(batch[0]), batch[1]).backward()
    optimizers.step_weights()


def one_stage_step(optimizers: Optimizers, batch: tuple[Tensor, Tensor]) -> None:
    """One gradient for both."""
    optimizers.zero_grad()
    loss(optimizers.net(batch[0]), batch[1]).backward()
    optimizers.step_weights()
    optimizers.adam.step()


def retrain_step(
    net: TargetNet,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
) -> None:
    optimizer.zero_grad()
    loss(net(batch[0]), batch[1]).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 5.0)
    optimizer.step()


def loss(outputs: tuple[Tensor, Tensor | None], target: Tensor) -> Tensor:
    """Of the logits, and of the auxiliary head's with the published weight."""
    logits, auxiliary = outputs
    total = F.cross_entropy(logits, target)
    return total if auxiliary is None else total + 0.4 * F.cross_entropy(auxiliary, target)


# ---------- pictures and codes
def pil_augmentation(mean: Sequence[float], std: Sequence[float]) -> Any:
    """Crop, flip, normalise and cutout of one PIL picture, to (C, H, W)."""
    from torchvision import transforms

    def cutout(image: Tensor) -> Tensor:
        _, height, width = image.shape
        y, x = np.random.randint(height), np.random.randint(width)
        mask = torch.ones(height, width)
        mask[max(0, y - 8) : y + 8, max(0, x - 8) : x + 8] = 0.0
        return image * mask

    return transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
            cutout,
        ]
    )


def recover_with_cvxpy(A: np.ndarray, b: np.ndarray, l1_weight: float) -> tuple[Any, int]:
    """argmin 1/2 ||A z - b||^2 + l1 ||z||_1 of one node, and the iterations that it took."""
    import cvxpy as cp  # here: a process that measures a network's memory does without

    z = cp.Variable(A.shape[1])
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(A @ z - b) + l1_weight * cp.norm1(z)))
    problem.solve(solver="CLARABEL")
    return z.value, problem.solver_stats.num_iters
