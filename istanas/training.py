"""Training code that search and retraining share: device and precision, seeds, schedules, totals, epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from istanas.data import Batch
from istanas.data.mixing import Mix
from istanas.distributed import Ranks
from istanas.errors import DivergedError
from istanas.nets import TargetNetwork
from istanas.seeds import derive_seed as derive_seed  # callers import it from here, too
from istanas.settings import Schedule

TOP5_ABOVE = 10
"""Top-5 is measured if there are more classes than this."""

BatchLike = Batch | tuple[Tensor, Tensor]  # The third field of `Batch`, the weight, is optional.
# Called with the completed steps of the epoch and the totals so far.
Observer = Callable[[int, "Totals"], None]

SCHEDULES = get_args(Schedule)  # See `learning_rate`.
TAIL_EPOCHS = 5  # Largest number of tail epochs of the schedule linear_by_epoch.


@dataclass(frozen=True)
class Compute:
    """The device and the precision of computations, see `pipeline.training.compute.compute_for`."""

    device: torch.device
    autocast_dtype: torch.dtype | None = None

    @property
    def backend(self) -> str:
        """The backend of torch.distributed that moves this device's tensors."""
        return "nccl" if self.device.type == "cuda" else "gloo"

    def autocast(self) -> torch.autocast:
        """Return the mixed-precision context of a forward pass. Without `autocast_dtype` it has no effect."""
        return torch.autocast(
            self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None
        )


@dataclass(frozen=True)
class Metrics:
    """Means over the pictures of one pass.

    Args:
        loss: Mean cross-entropy.
        top1: Fraction in [0, 1] of the pictures whose class has the largest logit.
        count: Number of pictures.
        top5: Fraction in [0, 1] of the pictures whose class has one of the five largest logits; None with
            `TOP5_ABOVE` classes or fewer.
    """

    loss: float
    top1: float
    count: int
    top5: float | None = None


class Totals:
    """Sums over the pictures of a pass. They stay on the device, so that only `metrics` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # Loss, top-1, top-5.
        self._count = self._top5_count = 0

    def add(self, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        """Add a batch with its mean `loss`, its `logits` (B, classes) and its labels `target` (B,).

        Top-5 is counted if there are more than `TOP5_ABOVE` classes. `torch.topk` decides between equal logits.
        """
        logits = logits.detach()
        correct = (logits.argmax(1) == target).sum()
        sums = [loss.detach().double() * len(target), correct.double()]
        if logits.shape[1] > TOP5_ABOVE:
            sums.append((logits.topk(5, dim=1).indices == target[:, None]).sum().double())
            self._top5_count += len(target)
        self._sums[: len(sums)] += torch.stack(sums)
        self._count += len(target)

    def metrics(self, ranks: Ranks | None = None) -> Metrics:
        """Return the means so far (NaN before the first batch), over the pictures of all ranks if they are given."""
        # All ranks send five numbers, because a rank without a batch does not know the number of classes.
        sums = [*self._sums.tolist(), self._count, self._top5_count]
        loss, correct, correct5, count, top5_count = sums if ranks is None else ranks.sum(sums)
        n = int(count)
        if n == 0:
            return Metrics(math.nan, math.nan, 0)
        return Metrics(loss / n, correct / n, n, correct5 / n if top5_count else None)


def learning_rate(
    base: float,
    minimum: float,
    epoch: float,
    epochs: int,
    *,
    schedule: str = "cosine",
    warmup_epochs: float = 0.0,
) -> float:
    """Return the learning rate at a point of the run.

    With W = warmup_epochs and t = (epoch - W) / (epochs - W):

    - cosine: minimum + (base - minimum) (1 + cos(pi t)) / 2
    - linear: base + (minimum - base) t
    - linear_by_epoch: minimum + (base - minimum) f, one value for each whole epoch e = floor(epoch). Warm-up epochs
      count, too. Let n = min(`TAIL_EPOCHS`, epochs // 2). Until n epochs remain,
      f = (epochs - n - e) / (epochs - n); after that f = (epochs - e) / (n (epochs - n)).

    Before epoch W the rate is `base` times `warmup_factor`.

    Args:
        base: Learning rate at the start, >= minimum.
        minimum: Learning rate at the end, >= 0.
        epoch: Completed epochs, fractions included, in [0, epochs].
        epochs: Length of the run, >= 1.
        schedule: One of `SCHEDULES`.
        warmup_epochs: Length of the warm-up, in [0, epochs).

    Example:
        >>> [round(learning_rate(0.1, 0.0, epoch, 10), 3) for epoch in (0, 5, 10)]
        [0.1, 0.05, 0.0]
        >>> rates = [learning_rate(0.5, 0.0, e, 250, schedule="linear_by_epoch", warmup_epochs=5) for e in range(250)]
        >>> [round(rates[e], 4) for e in (0, 4, 5, 125, 244, 245, 249)]
        [0.1, 0.5, 0.4898, 0.2449, 0.002, 0.002, 0.0004]

    Source:
        linear_by_epoch: the schedule of the published ImageNet retraining (Yang et al., ISTA-NAS, NeurIPS 2020).
    """
    by_epoch = schedule == "linear_by_epoch"
    done = int(epoch) if by_epoch else epoch
    if done < warmup_epochs:
        return base * warmup_factor(epoch, warmup_epochs, schedule)
    if by_epoch:
        tail = min(TAIL_EPOCHS, epochs // 2)
        rest = epochs - tail
        left = (rest - done) / rest if epochs - done > tail else (epochs - done) / (max(tail, 1) * rest)
        return minimum + (base - minimum) * left
    progress, warmup = epoch / epochs, warmup_epochs / epochs
    t = (progress - warmup) / (1.0 - warmup)
    if schedule == "linear":
        return base + (minimum - base) * t
    return minimum + (base - minimum) * (1.0 + math.cos(math.pi * t)) / 2.0


def warmup_factor(epoch: float, warmup_epochs: float, schedule: str = "cosine") -> float:
    """Return the factor of the learning rate in the warm-up, in [0, 1]; after the warm-up it is 1.

    It is epoch / warmup_epochs, updated in every step. With the schedule linear_by_epoch, which has one rate for each
    epoch, it is (floor(epoch) + 1) / warmup_epochs.

    Args:
        epoch: Completed epochs, fractions included, >= 0.
        warmup_epochs: Length of the warm-up, >= 0.
        schedule: One of `SCHEDULES`.

    Example:
        >>> warmup_factor(2.5, 5), warmup_factor(2.5, 5, "linear_by_epoch"), warmup_factor(5, 5), warmup_factor(0, 0)
        (0.5, 0.6, 1.0, 1.0)
    """
    by_epoch = schedule == "linear_by_epoch"
    if (int(epoch) if by_epoch else epoch) >= warmup_epochs:
        return 1.0
    return min((int(epoch) + 1 if by_epoch else epoch) / warmup_epochs, 1.0)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


@contextmanager
def without_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Return a context in which the gradients of these parameters are not computed.

    An alpha step without the weights' gradients takes half the time.
    """
    trained = [p for p in parameters if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> None:
    """Scale the gradients so that their joint norm is at most `max_norm`. `None` leaves them unchanged."""
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of (B, classes) logits, computed in float32 or float64.

    The target is (B,) labels, or (B, classes) shares of the classes.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing)


def evaluate(
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[BatchLike],
    compute: Compute,
    ranks: Ranks | None = None,
) -> Metrics:
    """Return mean loss and accuracies of a network in eval mode, over the pictures of all ranks.

    Args:
        forward: Pictures -> logits.
        batches: Batches on `compute.device`, see `istanas.data.Batch`.
        compute: Device and precision.
        ranks: The processes that evaluate together; `None` means only this one.
    """
    totals = Totals(compute.device)
    with torch.no_grad():
        for images, target, _ in (Batch(*batch) for batch in batches):
            with compute.autocast():
                logits = forward(images)
            totals.add(cross_entropy(logits, target), logits, target)
    return totals.metrics(ranks)


def check_finite(
    metrics: Metrics,
    parameters: Iterable[Tensor],
    epoch: int,
    *,
    max_loss: float | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Check that an epoch has not diverged.

    The parameters are checked too, because the last step may have made them infinite after the last loss.

    Args:
        metrics: Metrics of the epoch's training, over the pictures of all ranks.
        parameters: Parameters of the network after the epoch.
        epoch: Completed epochs, this one included.
        max_loss: Largest loss that does not count as divergence; `None` accepts every finite loss.
        ranks: The processes that train together. If one of them has diverged, all raise the error.

    Raises:
        DivergedError: If the training loss or a parameter is NaN or infinite, or the loss is above its bound.
    """
    loss, bound = metrics.loss, ""
    is_infinite = not torch.stack([p.detach().isfinite().all() for p in parameters]).all()
    # All ranks call `sum`, even those with an infinite loss, because the others would wait for them.
    (infinite_ranks,) = (ranks or Ranks()).sum([float(is_infinite)])
    if math.isfinite(loss) and infinite_ranks > 0:
        loss = math.nan
    if max_loss is not None and loss > max_loss and math.isfinite(loss):
        bound = f", above max_loss = {max_loss:g}"
    if bound or not math.isfinite(loss):
        raise DivergedError(
            f"training loss is {loss:.6g} in epoch {epoch}{bound}: the run diverged",
            remedy="lower the learning rate (lr) or grad_clip",
        )


def train_target_step(
    forward: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    optimizer: torch.optim.Optimizer,
    batch: BatchLike,
    compute: Compute,
    totals: Totals,
    *,
    auxiliary_weight: float,
    label_smoothing: float,
    grad_clip: float | None,
    mix: Mix | None = None,
) -> None:
    """Run a training step of a target network, with loss = CE(logits) + auxiliary_weight CE(auxiliary logits).

    Args:
        forward: Pictures -> (logits, auxiliary logits or None), of a network in training mode.
        optimizer: Optimiser of the network's parameters, whose learning rate is set.
        batch: A batch on `compute.device`, see `istanas.data.Batch`.
        compute: Device and precision.
        totals: The totals to which the batch is added, with the loss of the logits alone.
        auxiliary_weight: As in `train_target_epoch`.
        label_smoothing: As in `train_target_epoch`.
        grad_clip: As in `train_target_epoch`.
        mix: As in `train_target_epoch`.
    """
    images, target, weight = Batch(*batch)
    if mix is not None:
        images, target = mix(images, target)
    with compute.autocast():
        logits, auxiliary = forward(images)
    loss = cross_entropy(logits, target, label_smoothing)
    total = loss
    if auxiliary is not None:
        total = loss + auxiliary_weight * cross_entropy(auxiliary, target, label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    (total * weight).backward()
    clip_gradients([p for group in optimizer.param_groups for p in group["params"]], grad_clip)
    optimizer.step()
    totals.add(loss, logits, target if target.ndim == 1 else target.argmax(1))


def train_target_epoch(
    net: TargetNetwork,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[BatchLike],
    compute: Compute,
    *,
    lr_at: Callable[[int], float],
    auxiliary_weight: float,
    label_smoothing: float,
    grad_clip: float | None,
    observe: Observer | None = None,
    ranks: Ranks | None = None,
    mix: Mix | None = None,
    forward: Callable[[Tensor], tuple[Tensor, Tensor | None]] | None = None,
) -> Metrics:
    """Run one epoch of a target network, see `train_target_step`.

    Afterwards the running statistics of batch norm are averaged over the ranks.

    Args:
        net: The network, which is put into training mode. The caller sets its `drop_path_prob`.
        optimizer: Optimiser of the network's parameters.
        batches: Batches on `compute.device`, see `istanas.data.Batch`.
        compute: Device and precision.
        lr_at: Maps the index of a step to its learning rate.
        auxiliary_weight: Weight of the auxiliary head's loss, >= 0.
        label_smoothing: Label smoothing of the loss, in [0, 1).
        grad_clip: Largest joint norm of the gradients, > 0; `None` disables clipping.
        observe: Called after every step.
        ranks: The processes that train together, each on its share of every batch; `None` means only this one.
        mix: Mixes the pictures and labels of each batch, see `istanas.data.mixing`. A mixed picture then counts as
            correct if the class with the largest share has the largest logit.
        forward: Another form of `net.forward_with_auxiliary`, such as a compiled one.

    Returns:
        Mean loss and accuracies over the (augmented) pictures of all ranks.
    """
    net.train()
    ranks = ranks or Ranks()
    # Recreated in every epoch, so that a resumed run sums gradients in the same order as an uninterrupted one.
    forward = ranks.data_parallel(forward or net.forward_with_auxiliary, net.active_parameters())
    totals = Totals(compute.device)
    for step, batch in enumerate(batches):
        set_learning_rate(optimizer, lr_at(step))
        train_target_step(
            forward,
            optimizer,
            batch,
            compute,
            totals,
            auxiliary_weight=auxiliary_weight,
            label_smoothing=label_smoothing,
            grad_clip=grad_clip,
            mix=mix,
        )
        if observe is not None:
            observe(step + 1, totals)
    ranks.average(net.active_buffers())
    return totals.metrics(ranks)
