"""The processes that train one network together: gradients averaged, figures summed, rank 0's word for all.

One process is the special case of one rank, for which everything here is the identity: the algorithms call it
always and do not ask how many they are.
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
    """This process among those that train together. Every method but the properties is called by all of them.

    Args:
        rank: of this process, in [0, size).
        size: number of processes; above 1 needs torch's default process group.
        device: where tensors of sums live; with the nccl backend the rank's GPU. None: the CPU.

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
        """The ranks of torch's default process group, or the one rank if there is none."""
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
        """`forward`, such that a backward pass through it leaves the mean over ranks in the parameters' gradients.

        Only the gradients of `parameters` travel, and all of them must get one: an operation that is not active
        is not in the list, so that it costs no byte and nothing has to be searched for.

        Args:
            forward: computes a loss or what one follows from.
            parameters: that get a gradient in the backward pass, in the same order on every rank; they take
                rank 0's values here.

        Source:
            Li et al., PyTorch Distributed: Experiences on Accelerating Data Parallel Training, VLDB 2020.
        """
        if self.size == 1:
            return forward
        return DistributedDataParallel(
            _Replica(forward, parameters), forward_sync_buffers=False, gradient_as_bucket_view=True
        )

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        result: list[float] = total.tolist()
        return result

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating-point tensors by their means over the ranks, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.detach().flatten() for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        with torch.no_grad():
            for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def from_first(self, compute: Callable[[], T]) -> T:
        """What rank 0 computes, on every rank; its error, if it raises one."""
        if self.size == 1:
            return compute()
        message: list[Any] = [None, None]
        if self.is_first:
            try:
                message[0] = compute()
            except IstanasError as error:  # the others would wait for a value for ever
                message[1] = error
        dist.broadcast_object_list(message, device=self.device)
        if message[1] is not None:
            raise message[1]
        result: T = message[0]
        return result

    def check_same(self, what: str, digest: str) -> None:
        """Stop on every rank if not all hold the same.

        Raises:
            IstanasError: with every digest and the ranks that hold it.

        Example:
            >>> Ranks().check_same("genotype", "27c9e710")
        """
        if self.size == 1:
            return
        digests: list[Any] = [None] * self.size
        dist.all_gather_object(digests, digest)
        if len(set(digests)) > 1:
            held = "; ".join(
                f"{d} on rank {', '.join(str(r) for r, other in enumerate(digests) if other == d)}"
                for d in dict.fromkeys(digests)
            )
            raise IstanasError(
                f"{what} differs between the workers ({held}): the job stops, the same command resumes from the "
                "last checkpoint; if it happens again, look for faulty memory or unequal versions of torch"
            )


class _Replica(nn.Module):
    """A function as a module that owns just the parameters whose gradients are to be averaged."""

    def __init__(self, forward: Callable[..., Any], parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.averaged = nn.ParameterList(parameters)
        self._function = (forward,)  # in a tuple: a module would be registered, with all its parameters

    def forward(self, *args: Any) -> Any:
        return self._function[0](*args)
