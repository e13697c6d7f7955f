"""Commands with --plugin: a user's data set in a job, its run without the plugin, changed files and pictures."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli.commands import run
from pipeline.config.plugins import load_plugins

PLUGIN = """
import numpy as np
from istanas.data import dataset_from_arrays, register_dataset

def stripes(request):
    with np.load(request.root) as file:
        pictures, labels = file["pictures"], file["labels"]
    return dataset_from_arrays(
        request, pictures[:80], labels[:80], pictures[80:], labels[80:], ["down", "across"]
    )

register_dataset("stripes", stripes, needs_root=True)
"""
TINY = """
data: {name: stripes, root: stripes.npz}
space: {nodes: 1}
search: {epochs: 1, batch_size: 40, init_channels: 2, layers: 3, cutout: 0}
retrain: {epochs: 1, batch_size: 40, init_channels: 2, layers: 2, auxiliary_weight: 0.0, cutout: 0}
runtime: {workers: 0, device: cpu, threads: 1}
tracking: {enabled: false}
"""

Command = Callable[..., tuple[int, str, str]]


def write_pictures(file: Path, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    labels = np.arange(100) % 2
    pictures = rng.integers(100, size=(100, 8, 8), dtype=np.uint8)
    pictures[labels == 1, ::2] = 255
    pictures[labels == 0, :, ::2] = 255
    np.savez(file, pictures=pictures, labels=labels)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "stripes.py").write_text(PLUGIN)
    write_pictures(tmp_path / "stripes.npz")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    load_plugins([])


@pytest.fixture
def istanas(here: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def command(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return command


JOB = ("--plugin", "stripes.py", "--config", "tiny.yaml")


def test_a_users_pictures_are_searched_and_trained_on(istanas: Command, here: Path) -> None:
    code, out, err = istanas("run", *JOB, "--json")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["test_top1"] is not None
    (search,) = here.glob("runs/tiny-search-*")
    environment = json.loads((search / "environment.json").read_text())
    (plugin,) = environment["plugins"]
    assert plugin["name"] == "stripes.py"
    record = json.loads((search / "run.json").read_text())
    assert record["dataset"] == "stripes"
    assert {use["name"][:-7] for use in record["datasets"]} == {f"{here.name.replace('_', '-')}-stripes-npz"}
    config = str(search / "config.yaml")
    code, out, _ = istanas("search", *JOB)
    assert code == 0
    assert "already finished" in out
    assert len(list(here.glob("runs/tiny-search-*"))) == 1, "the same command resumes"

    code, _, err = istanas("config", "--config", config)
    assert code == 2
    assert err == (
        f"error: {config}: data.name: 'stripes' is not a registered data set; this run used the plugin stripes.py: "
        "name it with --plugin FILE\n"
    )
    code, _, err = istanas("export", str(search))
    assert code == 2
    assert "this run used the plugin stripes.py" in err

    (here / "stripes.py").write_text(f"{PLUGIN}# changed\n")
    assert istanas("search", *JOB)[0] == 0
    assert len(list(here.glob("runs/tiny-search-*"))) == 2, "a changed plugin is another run"

    (here / "stripes.py").write_text(PLUGIN)
    write_pictures(here / "stripes.npz", seed=1)
    code, _, err = istanas("search", *JOB)
    assert code == 1
    assert err.startswith("error: data set stripes has changed since this run began")


def test_the_doctor_loads_a_users_pictures(istanas: Command, here: Path) -> None:
    line = next(line for line in istanas("doctor", *JOB)[1].splitlines() if " data: " in line)
    assert line.startswith("ok    data: stripes: 80 training and 20 test pictures of 2 classes, 8x8 pixels")
    np.savez(here / "stripes.npz", pictures=np.zeros((100, 8, 8)), labels=np.zeros(100, int))
    line = next(line for line in istanas("doctor", *JOB)[1].splitlines() if " data: " in line)
    assert line.startswith("fail  data: data.name: the pictures of the train split of stripes have the shape")


def test_keys_and_schema_list_what_plugins_register(istanas: Command) -> None:
    described = " ".join(istanas("config", "--describe", "data.name", *JOB[:2])[1].split())
    assert "folder (istanas), " in described
    assert ", stripes (stripes.py)" in described
    schema = json.loads(istanas("config", "--json-schema", *JOB[:2])[1])
    assert "stripes" in schema["$defs"]["DataSettings"]["properties"]["name"]["enum"]
    assert "stripes" not in istanas("config", "--json-schema")[1], "no command leaves a plugin behind"


def test_pictures_that_cannot_be_read_are_one_line(istanas: Command, here: Path) -> None:
    (here / "stripes.npz").unlink()
    code, _, err = istanas("run", *JOB)
    assert code == 1
    assert err.startswith("error: data.name: the function of stripes failed (FileNotFoundError: No such file")
    assert len(err.splitlines()) == 1
    assert not list(here.glob("runs/*"))


def test_large_arrays_get_the_stem_that_fits_them(istanas: Command, here: Path) -> None:
    pictures = np.random.default_rng(0).integers(256, size=(100, 65, 65, 3), dtype=np.uint8)
    np.savez(here / "stripes.npz", pictures=pictures, labels=np.arange(100) % 2)
    code, _, err = istanas("search", *JOB, "--set", "search.init_channels=2")
    assert code == 0, err
    (search,) = here.glob("runs/tiny-search-*")
    assert "stem: imagenet" in (search / "config.yaml").read_text()


def test_a_yaml_file_cannot_name_a_plugin(istanas: Command, here: Path) -> None:
    (here / "tiny.yaml").write_text(f"plugin: stripes.py\nplugins: [stripes.py]\n{TINY}")
    code, _, err = istanas("config", "--config", "tiny.yaml")
    assert code == 2
    assert "plugin: unknown key" in err


CHAIN = """
from dataclasses import dataclass
from torch import nn
from istanas.space import ChoiceSpace, Decision, register_space

@dataclass(frozen=True)
class Chain(ChoiceSpace):
    name = "chain"

    def make_decisions(self):
        return [Decision("NA", i, (("nan", 0), ("None", 0)), sparsity=1) for i in range(2)]

    def network(self, size, choose):
        c = size.init_channels
        blocks = [choose("NA", i, c, lambda op, affine: nn.Conv2d(c, c, 3, padding=1)) for i in range(2)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, size.num_classes)]
        return nn.Sequential(nn.Conv2d(size.in_channels, c, 1), *blocks, *head)

register_space(Chain)
"""
CHAIN_JOB = ("--plugin", "chain.py", "--set", "space={name: chain}", "--set", "data={name: digits}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "for i in range(2)]\n        head",
            "for i in range(1)]\n        head",
            "its network has no choice for NA 1",
        ),
        (
            "for i in range(2)]\n        head",
            "for i in range(3)]\n        head",
            "its network has a choice for NA 2, which is no decision",
        ),
        ("3, padding=1", "3 if op == 'nan' else 1", "its network raises RuntimeError"),
        ("*blocks, *head", "*blocks", "its network returns (2, 2, 8, 8) for pictures (2, 1, 8, 8); return"),
        ("c = size.init_channels", "c = size.channels", "its network raises AttributeError"),
    ],
)
@pytest.mark.parametrize("job", [("search",), ("retrain", "--genotype", "random:0")])
def test_a_space_without_a_working_network_is_one_line(
    istanas: Command, here: Path, job: tuple[str, ...], old: str, new: str, message: str
) -> None:
    assert old in CHAIN
    (here / "chain.py").write_text(CHAIN.replace(old, new))
    code, _, err = istanas(*job, "--config", "tiny.yaml", *CHAIN_JOB)
    assert code == 2
    assert err.startswith(f"error: space chain: {message}")
    assert len(err.splitlines()) == 1
    assert not list(here.glob("runs/*"))


def test_names_that_tables_could_take_for_numbers_are_kept(istanas: Command, here: Path) -> None:
    (here / "chain.py").write_text(CHAIN)
    code, _, err = istanas("search", "--config", "tiny.yaml", *CHAIN_JOB)
    assert code == 0, err
    (page,) = here.glob("runs/*/trajectory.html")
    assert "nan" in page.read_text()
    assert "plugins" in (page.parent / "report.html").read_text()
    file = str(page.parent / "genotype.json")
    code, _, err = istanas("draw", file)
    assert code == 2
    assert "belongs to the space chain, which is not registered; name the plugin" in err


def test_results_know_the_methods_of_plugins(istanas: Command, here: Path) -> None:
    (here / "own.py").write_text(
        "from istanas.methods import SearchMethod, register_method\n"
        "from istanas.search.darts import DartsSearch\n"
        "from istanas.settings import DartsSettings\n"
        "class Own(DartsSearch):\n    kind = 'own'\n"
        "register_method(SearchMethod('own', 'is own', DartsSettings, Own))\n"
    )
    assert istanas("results", "--method", "own", "--plugin", "own.py")[0] == 0
    code, _, err = istanas("results", "--method", "own")
    assert code == 2
    assert "method 'own': unknown; choose two_stage" in err
