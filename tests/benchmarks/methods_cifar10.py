"""Every search method, NAS-Bench-201 and the plugin of the guide once on CIFAR-10 pictures, as a table.

    python -m tests.benchmarks.methods_cifar10 DIR OUT

DIR is a picture folder, DIR/train/CLASS/*, DIR/test/CLASS/*. OUT receives copies of the first 500 training pictures of
each class and of all test pictures, the configurations, the runs and `table.csv`. All runs have the same settings but
for the method and the space, one thread and one seed, and two run at a time. A run that is interrupted resumes with the
same command. The figures say what each method costs, and that it runs. One seed and short trainings cannot rank the
methods.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.yaml_files import dump

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
PICTURES_PER_CLASS = 500
SEARCH = {"epochs": 4, "max_pictures": 2000, "batch_size": 64, "init_channels": 8, "layers": 5, "lr": 0.1}
ALPHAS = {"arch_lr": 0.01}
ONE_STAGE = {"max_search_epochs": 4, "train_epochs": 8, "cutout": 0, "max_params": None, "test_every": 8}
NAS_BENCH_201 = {
    "name": "nas_bench_201",
    "ops": ["skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"],
    "n_measurements": 3,
}
RETRAIN = {
    "epochs": 8,
    "batch_size": 64,
    "init_channels": 8,
    "layers": 5,
    "lr": 0.1,
    "auxiliary_weight": 0.0,
    "drop_path": 0.0,
    "cutout": 0,
    "test_every": 8,  # only after the last epoch
}
# name -> (method, settings of the search beside `SEARCH`, settings of the space)
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "darts": ("darts", ALPHAS, {}),
    "pc_darts": ("pc_darts", {**ALPHAS, "warmup_epochs": 2}, {}),
    "gdas": ("gdas", ALPHAS, {}),
    "two_stage": ("two_stage", ALPHAS, {}),
    "one_stage": ("one_stage", ALPHAS | ONE_STAGE, {}),
    "random_nas": ("random_nas", {"candidates": 100, "candidate_pictures": 320, "finalists": 5}, {}),
    "random": ("random", {}, {}),
    "two_stage in nas_bench_201": ("two_stage", ALPHAS, NAS_BENCH_201),
    "darts in nas_bench_201": ("darts", ALPHAS, NAS_BENCH_201),
    "two_stage in mobile_chain": ("two_stage", ALPHAS, {"name": "mobile_chain", "blocks": 6}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path, help="picture folder of CIFAR-10")
    parser.add_argument("out", type=Path, help="folder of the runs and of the table")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    copy_pictures(options.pictures.resolve(), out / "pictures")
    write_plugin(out)
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda name: run(name, out), RUNS))
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print((out / "table.csv").read_text())


def copy_pictures(pictures: Path, folder: Path, per_class: int = PICTURES_PER_CLASS) -> None:
    """Copy the first training pictures and all test pictures of each class."""
    for split, most in (("train", per_class), ("test", None)):
        for source in sorted((pictures / split).iterdir()):
            target = folder / split / source.name
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(source.iterdir())[:most]:
                if not (target / file.name).exists():
                    shutil.copyfile(file, target / file.name)


def write_plugin(out: Path) -> None:
    """Write the plugin of the guide, and its NumPy file with the same pictures."""
    from PIL import Image

    (text,) = re.findall(
        r"^cat > mobile\.py <<'PYTHON'\n(.*?)^PYTHON\n", GUIDE.read_text(), re.DOTALL | re.MULTILINE
    )
    (out / "mobile.py").write_text(text)
    arrays = {}
    for split, suffix in (("train", ""), ("test", "_test")):
        files = [
            (label, file)
            for label, folder in enumerate(sorted((out / "pictures" / split).iterdir()))
            for file in sorted(folder.iterdir())
        ]
        arrays[f"x{suffix}"] = np.stack([np.asarray(Image.open(file).convert("RGB")) for _, file in files])
        arrays[f"y{suffix}"] = np.array([label for label, _ in files])
    np.savez(out / "pictures.npz", **arrays)


def run(name: str, out: Path) -> dict[str, Any]:
    """Search and retrain, and return the row of the table."""
    method, search, space = RUNS[name]
    is_plugin = space.get("name") == "mobile_chain"
    layers = {"layers": 8} if space.get("name") == "nas_bench_201" else {}
    data = (
        {"name": "numpy", "root": str(out / "pictures.npz")}
        if is_plugin
        else {"name": "folder", "root": str(out / "pictures")}
    )
    common = {
        key: value
        for key, value in SEARCH.items()
        if key != "epochs" or method not in ("one_stage", "random")
    }
    if method == "one_stage":
        del common["max_pictures"]  # it trains its network on all pictures, as a retraining does
    config = {
        "method": method,
        "data": {**data, "crop_padding": 4, "horizontal_flip": True},
        "space": space,
        "search": {**common, **search, **layers},
        "retrain": {**RETRAIN, **layers},
        "runtime": {"threads": 1, "device": "cpu", "runs_dir": str(out / "runs")},
        "tracking": {"uri": f"sqlite:///{out}/mlflow.db"},
    }
    file = out / f"{name.replace(' ', '_')}.yaml"
    file.write_text(dump(config))
    command = [sys.executable, "-m", "pipeline.cli", "run", "--config", str(file), "--json"]
    if is_plugin:
        command += ["--plugin", str(out / "mobile.py")]
    with file.with_suffix(".log").open("w") as log:
        done = subprocess.run(command, cwd=out, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name}: exit code {done.returncode}, see {file.with_suffix('.log')}")
    result = json.loads(done.stdout.splitlines()[-1])
    return {
        "run": name,
        "search_seconds": round(result.get("search_seconds", result["seconds"]), 1),
        "retrain_seconds": round(result.get("retrain_seconds", 0.0), 1),
        "valid_top1": result.get("valid_top1"),
        "test_top1": result["test_top1"],
        "params": result["params"],
        "macs": result["macs"],
        "genotype": result["digest"][:12],
    }


if __name__ == "__main__":
    main()
