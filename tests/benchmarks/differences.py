"""Effects of the differences from the published code: the figures of docs/differences.md.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.differences --root DIR

DIR is CIFAR-10 as a picture folder. The search is the published one with fewer channels, layers and steps. It takes
some minutes on one CPU core.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch

from istanas.distributed import Ranks
from istanas.measure import target_cost
from istanas.search.sparse_coding import draw_matrices
from istanas.space import CELLS, CellSpace, genotype_from_supports
from istanas.sparse import initial_compressed_alphas, recover_nodes, top_support
from istanas.training import Compute, Totals, cross_entropy, derive_seed, evaluate, set_learning_rate
from pipeline.config.load import load
from pipeline.training.build import build_search
from pipeline.training.pictures import Batches, open_dataset, search_augmentation
from pipeline.training.splits import splits_of

ROOT = Path(__file__).resolve().parents[2]
EPOCHS, STEPS = 4, 60


def norm(tensors: list[torch.Tensor]) -> float:
    """Return the joint Euclidean norm."""
    return float(torch.stack([t.detach().double().norm() for t in tensors]).norm()) if tensors else 0.0


def first_architectures(n: int = 1000) -> float:
    """Return the share of the published one-stage search's first architectures above 3.7 million parameters."""
    space, above = CellSpace(), 0
    for seed in range(n):
        matrices = draw_matrices(space, 7, "uniform", seed)
        supports = {}
        for cell in CELLS:
            bs = [
                initial_compressed_alphas(7, derive_seed(seed, "alphas", cell, node), 1e-3)
                for node in range(space.n_nodes)
            ]
            results = recover_nodes([A.numpy() for A in matrices[cell]], bs)
            supports[cell] = [tuple(map(int, top_support(result.z, 2))) for result in results]
        cost = target_cost(
            genotype_from_supports(space, supports),
            init_channels=36,
            layers=20,
            num_classes=10,
            shape=(3, 32, 32),
            op_batchnorm=True,
        )
        above += cost.params > 3_700_000
    return above / n


def two_stage(root: Path) -> None:
    """Train a small search on CIFAR-10; print what clipping and augmented validation would change."""
    file = ROOT / "tune_configs" / "two_stage_cifar10.yaml"
    sizes = ["search.init_channels=8", "search.layers=5", "search.batch_size=64", "runtime.threads=1"]
    config = load(file, ["data.name=folder", f"data.root={root}", *sizes])
    assert config.method == "two_stage"
    dataset, compute, ranks = open_dataset(config, ["search"]), Compute(torch.device("cpu")), Ranks()
    splits = splits_of(config, dataset, "search")
    training, of_alphas = splits.training, splits.alpha_half()
    search = build_search(config, dataset, compute, ranks)
    batches = Batches(config, dataset, compute, ranks, config.search.batch_size, search_augmentation(config))
    alphas = search.supernet.alphas()
    measured = of_alphas[::5]  # the halves are in the order of the folder: every class
    clip, steps = config.search.grad_clip or math.inf, []
    entries: list[float] = []  # median |gradient| of the entries of all b
    for epoch in range(EPOCHS):
        totals = Totals(compute.device)
        pairs = zip(
            batches.training("weights", training, epoch),
            batches.training("alphas", of_alphas, epoch),
            strict=False,
        )
        search.supernet.train()
        for _, (batch, alpha_batch) in zip(range(STEPS), pairs, strict=False):
            set_learning_rate(search.weight_optimizer, 0.1)
            search.alpha_step(alpha_batch)
            of_alphas = [b.grad.clone() for b in alphas if b.grad is not None]
            entries.append(float(torch.cat(of_alphas).abs().median()))
            # The published step clips the weights' gradients together with the alphas', the sum of both steps'.
            gradients = torch.autograd.grad(
                cross_entropy(search.supernet(batch.images), batch.labels),
                [*search.supernet.active_parameters(), *search.supernet.active_alphas()],
            )
            n = len(search.supernet.active_parameters())
            joint = [a + b for a, b in zip(of_alphas, gradients[n:], strict=True)]
            steps.append((norm([*gradients[:n]]), norm(joint)))
            search.weight_step(batch, totals)
        search.epoch += 1
        print(f"epoch {epoch + 1}: training top-1 {totals.metrics().top1:.3f}", flush=True)
        plain = search.validate(batches.measuring("train", measured))
        augmented = evaluate(search.supernet.eval(), batches.training("alphas", measured, 99), compute, ranks)
        print(f"  validation top-1: plain {plain.top1:.4f}, augmented {augmented.top1:.4f}", flush=True)
        search.recover()
    g = float(np.median(entries))
    print(f"median |gradient| of an entry of b: {g:.3g}")
    for t in (
        1,
        10,
        100,
        1000,
    ):  # the published code adds eps to sqrt(v) before the bias correction, torch after it
        published, ours = 1e-8 / math.sqrt(1 - 0.999**t), 1e-8
        print(f"  Adam step {t}: published / ours = 1 - {1 - (g + ours) / (g + published):.2g}")
    of_weights, of_joint = (np.array(column) for column in zip(*steps, strict=True))
    ours = np.minimum(1, clip / of_weights)
    published = np.minimum(1, clip / np.hypot(of_weights, of_joint))
    print(
        f"norm of the gradients: weights {np.median(of_weights):.3g} (median), alphas {np.median(of_joint):.3g}; "
        f"steps that are clipped: ours {np.mean(ours < 1):.0%}, published {np.mean(published < 1):.0%}"
    )
    for epoch in range(EPOCHS):
        part = (published / ours)[epoch * STEPS : (epoch + 1) * STEPS]
        print(
            f"  epoch {epoch + 1}: published step / ours: median {np.median(part):.2f}, least {part.min():.2f}"
        )


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"first architectures above the limit: {first_architectures():.3f}", flush=True)
    two_stage(arguments.root)


if __name__ == "__main__":
    main()
