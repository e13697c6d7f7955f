"""The processes that train one network together: they average gradients, sum metrics, and share rank 0's results.

A single process is the special case of one rank, for which all operations are the identity. The algorithms therefore
need not distinguish the two cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from istanas.errors import IstanasError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among those that train together. All processes must call each method.

    Args:
        rank: Rank of this process, in [0, size).
        size: Number of processes, >= 1. More than one process requires torch's default process group.
        device: Device of tensors that are sent: with the nccl backend, the rank's GPU. `None` uses the CPU.

    Example:
        >>> alone = Ranks()
        >>> alone.sum([1.0, 2.0]), alone.from_first(lambda: "chosen"), alone.is_first
        ([1.0, 2.0], 'chosen', True)
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    @classmethod
    def current(cls, device: torch.device) -> Ranks:
        """Return the ranks of torch's default process group, or a single rank if there is none."""
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """Whether this rank recovers codes, writes checkpoints and reports."""
        return self.rank == 0

    def data_parallel(
        self, forward: Callable[..., Any], parameters: Sequence[nn.Parameter]
    ) -> Callable[..., Any]:
        """Return a form of `forward` whose backward pass averages the gradients of the parameters over the ranks.

        Only the gradients of `parameters` are sent, and each parameter must get one. The list must not contain
        parameters of inactive operations, so that torch neither sends nor searches for unused ones.

        Args:
            forward: Computes a loss, or outputs from which a loss is computed.
            parameters: Parameters that get a gradient, in the same order on every rank. They are set to the values of
                rank 0.

        Source:
            Li et al., PyTorch Distributed: Experiences on Accelerating Data Parallel Training, VLDB 2020.
        """
        if self.size == 1:
            return forward
        # The replica has no buffers, so that none are synchronised.
        return DistributedDataParallel(_Replica(forward, parameters), gradient_as_bucket_view=True)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of the values over all ranks, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        result: list[float] = total.tolist()
        return result

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating-point tensors by their means over the ranks, in one all-reduce."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.detach().flatten() for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        with torch.no_grad():
            for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace the gradients of parameters by their means over the ranks, in one all-reduce.

        The result is that of `data_parallel`, whose preparation is too slow for parameters that change in every step.

        Args:
            parameters: Parameters in the same order on every rank. One without a gradient has none on any rank.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.size == 1 or not gradients:
            return
        # As in DistributedDataParallel, each rank divides before the sum.
        flat = torch.cat([g.flatten() for g in gradients]).div_(self.size)
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def from_first(self, compute: Callable[[], T]) -> T:
        """Return the result of rank 0 on every rank.

        Raises:
            IstanasError: If `compute` raises it on rank 0. Every rank then raises it.
        """
        if self.size == 1:
            return compute()
        message: list[Any] = [None, None]
        if self.is_first:
            try:
                message[0] = compute()
            except IstanasError as error:  # The other ranks would wait for a result for ever.
                message[1] = error
        dist.broadcast_object_list(message, device=self.device)
        if message[1] is not None:
            raise message[1]
        result: T = message[0]
        return result

    def check_same(self, what: str, digest: str) -> None:
        """Check that a digest is the same on all ranks.

        Args:
            what: Name of the compared object, for the error message.
            digest: Its digest on this rank.

        Raises:
            IstanasError: If the digests differ. The message lists every digest with its ranks.

        Example:
            >>> Ranks().check_same("genotype", "27c9e710")
        """
        if self.size == 1:
            return
        digests: list[Any] = [None] * self.size
        dist.all_gather_object(digests, digest)
        if len(set(digests)) > 1:
            found = "; ".join(
                f"{d} on rank {', '.join(str(r) for r, other in enumerate(digests) if other == d)}"
                for d in dict.fromkeys(digests)
            )
            raise IstanasError(
                f"differs between the workers ({found})",
                field=what,
                remedy="run the same command again, which resumes from the last checkpoint; if it happens again, look "
                "for faulty memory or unequal versions of torch",
            )


class _Replica(nn.Module):
    """A module that wraps a function and has only the parameters whose gradients are averaged."""

    def __init__(self, forward: Callable[..., Any], parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.averaged = nn.ParameterList(parameters)
        self._function = (
            forward,
        )  # In a tuple, because torch would register a module with all its parameters.

    def forward(self, *args: Any) -> Any:
        return self._function[0](*args)
