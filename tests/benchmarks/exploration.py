"""Does two-stage search find better architectures if it explores? Variants of it in the space of NAS-Bench-201.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.exploration --table TABLE --root DIR --work WORK [--seeds N]

The published search recovers its codes once per epoch, and trains only what they keep. The variants (`VARIANTS`)
explore within the epochs; the codes at the end of an epoch are those of the published search in all of them. All runs
have the same pictures, network and number of steps. Each run adds a row to `results/exploration.csv`, and runs with a
row are not repeated. `--summary` prints the means. A plugin registers the method `explored`, a subclass of two-stage
search.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge

from istanas.nets import NodeCode
from istanas.search import RecoveryReport, SearchMethod, TwoStageSearch, TwoStageSettings, register_method
from istanas.search.base import Place
from istanas.training import derive_seed
from tests.benchmarks.scored_runs import Found, Row, check_paths, execute, parser, search, summary

PATHS = {
    "table": "table of true accuracies",
    "root": "CIFAR-10 as a picture folder",
    "work": "folder of the run directories",
}
RESULTS = Path(__file__).resolve().with_name("results") / "exploration.csv"
RANKS = RESULTS.with_name("exploration_ranks.csv")
SEARCH = {
    "epochs": 20,
    "max_pictures": 15000,
    "alpha_fraction": 0.333333,
    "batch_size": 64,
    "init_channels": 8,
    "layers": 5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "recovery every 10 steps": {"recovery_steps": 10},
    "random first": {"random_epochs": 7},
    "noise": {"recovery_steps": 10, "noise": 1.0},
    "random first, noise": {"random_epochs": 7, "recovery_steps": 10, "noise": 1.0},
    "random first, most frequent": {
        "random_epochs": 7,
        "recovery_steps": 10,
        "noise": 1.0,
        "most_frequent": True,
    },
}


@dataclass(frozen=True)
class ExploredSettings(TwoStageSettings):
    """Two-stage search with exploration.

    Args:
        recovery_steps: Interval, in steps, at which codes are recovered within an epoch. 0 disables it.
        random_epochs: Number of epochs at the beginning whose steps each compute a random architecture.
        noise: Standard deviation of the noise that recoveries within an epoch add to b, relative to the root mean
            square of b. It falls linearly to 0 at the end of the search.
        most_frequent: Whether the result keeps the candidates that the codes kept most often within the last half of
            the epochs.
    """

    recovery_steps: Annotated[int, Ge(0)] = 0
    random_epochs: Annotated[int, Ge(0)] = 0
    noise: Annotated[float, Ge(0)] = 0.0
    most_frequent: bool = False


class ExploredSearch(TwoStageSearch):
    """Two-stage search whose steps may compute other architectures than that of the last epoch; one process only."""

    kind = "explored"
    settings: ExploredSettings

    def begin(self) -> RecoveryReport:
        """Prepare the search."""
        self._counts: dict[Place, Counter[int]] = {place: Counter() for place in self.places}
        return super().begin()

    def train_epoch(self, *args: Any, **options: Any) -> Any:
        """Run one epoch, whose codes at the beginning are installed again at its end."""
        self._at_beginning = self.codes_by_place()
        return super().train_epoch(*args, **options)

    def begin_step(self, step: int, n_steps: int) -> None:
        """Install a random architecture, or new codes, if it is time."""
        s = self.settings
        if self.epoch < s.random_epochs:
            drawn = self.supernet.space.random_supports(derive_seed(self.seed, "explored", self.epoch, step))
            codes = self.codes_by_place()
            self.install({p: replace(code, support=drawn[p[0]][p[1]]) for p, code in codes.items()})
        elif s.recovery_steps and step % s.recovery_steps == 0:
            self.install(self._perturbed(step))

    def _perturbed(self, step: int) -> dict[Place, NodeCode]:
        """Return the codes of b plus noise, and count what they keep."""
        scale = self.settings.noise * (1 - self.epoch / self.settings.epochs)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "noise", self.epoch, step))
        alphas = [self.supernet.node_alphas(kind)[index] for kind, index in self.places]
        before = [b.detach().clone() for b in alphas]
        with torch.no_grad():
            for b in alphas:
                b += scale * b.square().mean().sqrt() * torch.randn(b.shape, generator=generator)
            recovered = self.recover_codes(self.places)
            for b, old in zip(alphas, before, strict=True):
                b.copy_(old)
        if 2 * self.epoch >= self.settings.epochs:
            for new in recovered:
                self._counts[new.place].update(new.code.support)
        return {new.place: new.code for new in recovered}

    def end_steps(self) -> None:
        """Install the codes of the last epoch, with which the report compares the new ones."""
        self.install(self._at_beginning)

    def finish_epoch(self) -> RecoveryReport:
        """Recover the codes; after the last epoch, keep what recurred most often."""
        report = super().finish_epoch()
        if self.settings.most_frequent and self.is_done:
            codes = self.codes_by_place()
            self.install({place: self._most_frequent(place, code) for place, code in codes.items()})
        return report

    def _most_frequent(self, place: Place, code: NodeCode) -> NodeCode:
        kept = [candidate for candidate, _ in self._counts[place].most_common(len(code.support))]
        return replace(code, support=tuple(sorted(kept)))

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the counts."""
        counts = [dict(self._counts[place]) for place in self.places]
        return {**super().state_dict(), "counts": counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        super().load_state_dict(state)
        self._counts = dict(zip(self.places, map(Counter, state["counts"]), strict=True))


def register() -> None:
    """Register the method; not at the import of this module, which tests collect."""
    method = SearchMethod("explored", "two-stage search with exploration", ExploredSettings, ExploredSearch)
    register_method(method)


def run(row: Row, root: Path, work: Path) -> Found:
    """Run a variant."""
    config = {
        "method": "explored",
        "data": {
            "name": "folder",
            "root": str(root),
            "cache_dir": str(work / "pictures"),
            "image_size": 16,
            "crop_padding": 2,
            "horizontal_flip": True,
        },
        "space": {"name": "nas_bench_201", "n_measurements": 3},
        "search": SEARCH | VARIANTS[row.method],
        "runtime": {"threads": 1, "device": "cpu"},
    }
    plugin = work / "explored.py"
    plugin.write_text("from tests.benchmarks.exploration import register\n\nregister()\n")
    return search(row, config, work, "--plugin", str(plugin))


def main() -> None:
    """Execute the runs that have no row."""
    made = parser(str(__doc__), **PATHS)
    made.add_argument("--seeds", type=int, default=4, help="number of seeds, from 0")
    options = made.parse_args()
    if options.summary:
        print(summary(RESULTS))
        return
    check_paths(made, options, *PATHS)
    work, root = options.work.resolve(), options.root.resolve()
    for row in [Row(variant, seed) for seed in range(options.seeds) for variant in VARIANTS]:
        execute(row, partial(run, row, root, work), options.table, RESULTS, RANKS)


if __name__ == "__main__":
    main()
