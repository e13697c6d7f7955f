"""Plugins: files and entry points, errors in one line, unloading, hashes, and values for other processes."""

import importlib.metadata
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from istanas.data import DATASETS, load_dataset
from istanas.errors import ConfigError
from istanas.methods import METHODS
from istanas.space import SPACES
from pipeline.config import plugins
from pipeline.config.describe import describe, json_schema
from pipeline.config.load import load, run_hash
from pipeline.config.plugins import Shipped, active_plugins, load_plugins, ship

SOURCE = """
import numpy as np
from istanas.data import dataset_from_arrays, register_dataset

class Settings:
    \"\"\"Something of the plugin that is pickled.\"\"\"

def bright(request):
    pictures = np.full((4, 8, 8), 200, np.uint8)
    return dataset_from_arrays(request, pictures, [0, 1, 0, 1], pictures, [0, 1, 0, 1])

register_dataset("bright", bright)
"""


@pytest.fixture(autouse=True)
def unloaded() -> Iterator[None]:
    """No plugin is loaded before and after a test."""
    load_plugins([])
    yield
    load_plugins([])


def written(folder: Path, source: str = SOURCE, name: str = "bright.py") -> str:
    file = folder / name
    file.write_text(source)
    return str(file)


def refusal(*files: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_plugins(files)
    (line,) = str(caught.value).splitlines()
    return line


def test_a_file_registers_under_its_name_and_is_unloaded(tmp_path: Path) -> None:
    (plugin,) = load_plugins([written(tmp_path)])
    assert plugin.name == "bright.py"
    assert len(plugin.digest) == 64
    assert DATASETS.origin("bright") == "bright.py"
    assert load_dataset("bright").num_classes == 2
    load_plugins([])
    assert "bright" not in DATASETS
    assert active_plugins() == ()


def test_a_process_executes_each_content_once(tmp_path: Path) -> None:
    count = tmp_path / "count"
    source = f"open({str(count)!r}, 'a').write('x')\n{SOURCE}"
    first, copy = written(tmp_path, source), written(tmp_path, source, "copy.py")
    assert len(load_plugins([first, first, copy])) == 1
    load_plugins([])
    load_plugins([copy])
    assert count.read_text() == "x"
    assert "bright" in DATASETS


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("x = (\n", "line 1: SyntaxError: '(' was never closed; correct the plugin"),
        ("\n\nx = y\n", "line 3: NameError: name 'y' is not defined; correct the plugin"),
        ("def f():\n    raise ValueError('a\\nb')\nf()\n", "line 2: ValueError: a b; correct the plugin"),
        ("import nowhere\n", "line 1: ModuleNotFoundError: No module named 'nowhere'; correct the plugin"),
        ("import sys\nsys.exit()\n", "line 2: SystemExit"),
        ("x = 1\n", "registers nothing; call register_dataset"),
        (f"{SOURCE}\nregister_dataset('bright', bright)\n", "line 14: data.name: the data set 'bright' is"),
        (SOURCE.replace('"bright"', '"digits"'), "line 12: data.name: the data set 'digits' is already reg"),
        (SOURCE.replace(", bright)", ", None)"), "line 12: data.name: 'bright' has no function that loads"),
        ("x = '\0'\n", "null bytes"),
    ],
)
def test_a_plugin_that_fails_is_one_line_and_registers_nothing(
    tmp_path: Path, source: str, line: str
) -> None:
    file, before = written(tmp_path, source), list(DATASETS)
    found = refusal(file)
    assert found.startswith(f"--plugin {file}: ")
    assert line in found
    assert list(DATASETS) == before
    assert active_plugins() == ()


def test_a_path_that_is_no_text_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    with (tmp_path / "large.py").open("wb") as file:
        file.truncate(plugins.SOURCE_BYTES + 1)
    assert refusal("nowhere.py") == "--plugin nowhere.py: no such file; name a Python file"
    assert "a folder, not a file" in refusal(str(tmp_path))
    assert "not UTF-8" in refusal(str(tmp_path / "latin.py"))
    assert "larger than" in refusal(str(tmp_path / "large.py"))


def test_two_plugins_with_one_name_are_refused_with_the_owner(tmp_path: Path) -> None:
    other = written(tmp_path, f"{SOURCE}# another content\n", "other.py")
    assert "'bright' is already registered, by bright.py" in refusal(written(tmp_path), other)
    assert "bright" not in DATASETS


def test_the_hash_has_the_content_of_plugins_and_not_their_order(tmp_path: Path) -> None:
    config = load(None)
    without = run_hash(config, "search")
    first = written(tmp_path)
    second = written(tmp_path, SOURCE.replace('"bright"', '"brighter"'), "second.py")
    load_plugins([first])
    one = run_hash(config, "search")
    load_plugins([first, second])
    both = run_hash(config, "search")
    load_plugins([second, first])
    assert run_hash(config, "search") == both
    load_plugins([written(tmp_path, f"{SOURCE}# changed\n")])
    changed = run_hash(config, "search")
    assert len({without, one, both, changed}) == 4
    load_plugins([])
    assert run_hash(config, "search") == without


def test_a_configuration_names_what_a_plugin_registers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'bright' is not a registered data set.* --plugin FILE"):
        load(None, ["data.name=bright"])
    load_plugins([written(tmp_path)])
    config = load(None, ["data.name=bright"])
    assert config.search.stem == "auto", "the size of the pictures is known only after loading"
    with pytest.raises(ConfigError, match=r"data\.image_size: 16 has no effect on bright"):
        load(None, ["data.name=bright", "data.image_size=16"])


def test_the_registered_side_or_the_size_decides_about_the_stem(tmp_path: Path) -> None:
    known = SOURCE.replace(", bright)", ", bright, side=8, resizable=True)")
    load_plugins([written(tmp_path, known)])
    assert load(None, ["data.name=bright"]).search.stem == "cifar"
    assert load(None, ["data.name=bright", "data.image_size=96"]).search.stem == "imagenet"


def test_another_process_loads_plugins_before_it_unpickles(tmp_path: Path) -> None:
    """The value contains an object of a class that only the plugin defines; the file is gone."""
    file = written(tmp_path)
    (plugin,) = load_plugins([file])
    settings = sys.modules[plugins.module_name(plugin)].Settings
    shipped = ship((load(None, ["data.name=bright"]), settings()))
    Path(file).unlink()
    (tmp_path / "shipped").write_bytes(pickle.dumps(shipped))
    code = (
        "import pickle, sys; config, settings = pickle.load(open(sys.argv[1], 'rb')).open();"
        "from istanas.data import load_dataset; from pipeline.config.load import run_hash;"
        "print(load_dataset(config.data.name).num_classes, type(settings).__name__, run_hash(config, 'search'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "shipped")], capture_output=True, text=True, check=True
    )
    config, _ = shipped.open()
    assert done.stdout.split() == ["2", "Settings", run_hash(config, "search")]
    assert SOURCE not in repr(shipped)


def test_opening_unloads_the_plugins_of_an_earlier_task(tmp_path: Path) -> None:
    """Trials of a sweep share processes."""
    nothing = ship("value")
    load_plugins([written(tmp_path)])
    assert nothing.open() == "value"
    assert "bright" not in DATASETS


# ---------- installed packages
def install(folder: Path, monkeypatch: pytest.MonkeyPatch, value: str, source: str, module: str) -> None:
    """Make a distribution with an entry point visible, as an installation does."""
    info = folder / "my_search-1.2.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-search\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\nours = {value}\n")
    (folder / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, module, raising=False)  # that of another test, whose folder is deleted


def test_an_entry_point_is_loaded_without_being_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SOURCE.replace('register_dataset("bright", bright)', "")
    source += "def register():\n    register_dataset('bright', bright)\n"
    install(tmp_path, monkeypatch, "my_search_a:register", source, "my_search_a")
    (plugin,) = load_plugins([])
    assert plugin.name == "ours (my-search 1.2)"
    assert DATASETS.origin("bright") == "ours (my-search 1.2)"
    shipped = ship("value")
    assert shipped.open() == "value"
    (tmp_path / "my_search_a.py").write_text(f"{source}# changed\n")
    assert load_plugins([])[0].digest != plugin.digest
    with pytest.raises(ConfigError, match=r"plugin ours \(my-search 1\.2\): .* differs .* install the same"):
        Shipped(
            (plugins.Plugin("ours (my-search 1.2)", "0", "", entry_point=plugin.entry_point),), b""
        ).open()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("my_search_b:missing", "has no attribute 'missing'"),
        ("my_search_b", "registers nothing"),
        ("my_search_nowhere", "No module named 'my_search_nowhere'"),
    ],
)
def test_a_broken_entry_point_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, reason: str
) -> None:
    install(tmp_path, monkeypatch, value, "x = 1\n", "my_search_b")
    line = refusal()
    assert line.startswith("plugin ours (my-search 1.2): ")
    assert reason in line


def test_a_shipped_package_that_is_not_installed_is_one_line() -> None:
    plugin = plugins.Plugin("ours (my-search 1.2)", "0", "", entry_point="my_search_c")
    with pytest.raises(ConfigError, match="it is not installed where this process runs; install the same"):
        Shipped((plugin,), b"").open()


def test_own_entries_are_not_those_of_the_first_plugin(tmp_path: Path) -> None:
    """A plugin may be the first that imports the package's modules, in a process of its own."""
    (tmp_path / "bright.py").write_text(SOURCE + "from istanas.space import SPACES, OPERATIONS\n")
    code = (
        "from pipeline.config.plugins import load_plugins; load_plugins(['bright.py'])\n"
        "from istanas.data.registry import DATASETS; from istanas.methods import METHODS\n"
        "from istanas.space import OPERATIONS, SPACES\n"
        "print({r.origin(n) for r in (DATASETS, METHODS, OPERATIONS, SPACES) for n in r if n != 'bright'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "{'istanas'}\n"


# ---------- what a space and a method must have
SPACE = """
from dataclasses import dataclass, field
from torch import nn
from istanas.space import ChoiceSpace, Decision, register_space

@dataclass(frozen=True)
class Pair(ChoiceSpace):
    name = "pair"
    blocks: int = 2

    def make_decisions(self):
        return [Decision("block", i, (("conv", 0), ("skip", 0)), sparsity=1) for i in range(self.blocks)]

    def network(self, size, choose):
        return nn.Identity()

register_space(Pair)
"""
METHOD = """
from dataclasses import dataclass
from istanas.search import Search, SearchMethod, register_method
from istanas.search.softmax import SoftmaxSearch
from istanas.settings import AlternatingSettings, SearchSettings

@dataclass(frozen=True)
class Settings(AlternatingSettings):
    gain: float = 1.0

class Sigmoids(SoftmaxSearch[Settings]):
    kind = "sigmoid"

    def weigh(self, kind, alphas):
        return [each.sigmoid() for each in alphas]

register_method(SearchMethod("sigmoid", "weighs by sigmoids", Settings, Sigmoids))
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("@dataclass(frozen=True)", "", "space pair: Pair is no dataclass; add @dataclass(frozen=True)"),
        ("@dataclass(frozen=True)", "@dataclass", "TypeError: unhashable type: 'Pair'"),
        ("def network(", "def net(", "space pair: Pair lacks network; define what is missing"),
        ("blocks: int = 2", "blocks: int", "blocks: a key of a settings class has no default"),
        (
            "blocks: int = 2",
            "blocks: nn.Module = None",
            "Pair.blocks: <class 'torch.nn.modules.module.Module'>",
        ),
        ("blocks: int = 2", "blocks: int = 'two'", "validation error"),
        ("blocks: int = 2", "blocks: int = 2; solver: int = 1", "Pair.solver: the name is taken"),
        ("blocks: int = 2", "blocks: int = 2; build: int = 1", "Pair.build: the name is taken"),
        ('name = "pair"', 'name: str = "pair"', "Pair.name: the name is taken"),
        (
            "blocks: int = 2",
            "blocks: int = 2; sizes: dict[str, int] = field(default_factory=dict)",
            "unhashable type: 'dict'",
        ),
        ("blocks: int = 2", "blocks: int = 0", "the space pair has no decisions; give it at least one"),
        ('(("conv", 0), ("skip", 0))', "()", "line 12: space: block 0 has no candidates"),
        ('(("conv", 0), ("skip", 0))', '("conv", "skip")', "give candidates as (operation, state)"),
        ('(("conv", 0), ("skip", 0))', '[["conv", 0], ["skip", 0]]', "give candidates as (operation, state)"),
        ('"block", i', '"block", i + 1', "the decisions of kind block do not count from 0"),
        ('"block", i', '"../block", i', "'../block' cannot name a kind of decision"),
        ("return [Decision", "raise ValueError([Decision", "line 12: "),
    ],
)
def test_a_space_that_cannot_work_is_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    source = SPACE.replace(old, new)
    if "raise" in new:
        source = source.replace("self.blocks)]", "self.blocks)])")
    assert message in refusal(written(tmp_path, source))
    assert "pair" not in SPACES
    load_plugins([written(tmp_path, SPACE)])
    assert load(None, ["space.name=pair", "space.blocks=3"]).space.build().blocks == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "sigmoid"', "", "Sigmoids.kind is None; set it to 'sigmoid'"),
        ('kind = "sigmoid"', 'kind = "darts"', "Sigmoids.kind is 'darts'; set it to 'sigmoid'"),
        ("SoftmaxSearch[Settings]", "", "does not derive from Search; derive it from that"),
        (
            "SoftmaxSearch[Settings]",
            "Search[Settings]",
            "Sigmoids lacks train_epoch, train_step, finish_epoch",
        ),
        ("(AlternatingSettings)", "", "does not derive from SearchSettings; derive it from that"),
        ("(AlternatingSettings)", "(SearchSettings)", "Settings lacks max_epochs; define what is missing"),
        ("@dataclass(frozen=True)", "", "Settings is no dataclass; add @dataclass(frozen=True)"),
        ("gain: float = 1.0", "gain: float = 'loud'", "validation error"),
        ("gain: float = 1.0", "gain: 'Loud' = 1", "NameError: name 'Loud' is not defined"),
        ("gain: float = 1.0", "max_epochs: int = 1", "Settings.max_epochs: the name is taken"),
        ("Settings, Sigmoids))", "'nowhere:Settings', Sigmoids))", "No module named 'nowhere'"),
    ],
)
def test_a_method_that_cannot_work_is_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert message in refusal(written(tmp_path, METHOD.replace(old, new)))
    assert "sigmoid" not in METHODS
    load_plugins([written(tmp_path, METHOD)])
    assert load(None, ["method=sigmoid", "search.gain=2.0"]).search.max_epochs == 50


def test_settings_classes_of_one_name_do_not_share_a_schema(tmp_path: Path) -> None:
    """Editors check a file against the schema, in which every section has a name."""
    other = METHOD.replace('"sigmoid"', '"other"').replace("gain: float = 1.0", "loss: int = 1")
    taken = SPACE.replace("Pair", "DataSettings")
    load_plugins(
        [written(tmp_path, METHOD), written(tmp_path, other, "b.py"), written(tmp_path, taken, "c.py")]
    )
    definitions = json_schema()["$defs"]
    assert "gain" in definitions["search_section-sigmoid"]["properties"]
    assert "loss" in definitions["search_section-other"]["properties"]
    assert "blocks" in definitions["space_section-pair"]["properties"]
    assert {key.path for key in describe("search.gain")} == {"search.gain"}


def test_what_a_plugin_prints_does_not_reach_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs read a command's configuration or JSON from there."""
    load_plugins([written(tmp_path, f"{SOURCE}\nprint('hello')\n")])
    assert capsys.readouterr() == ("", "hello\n")
