"""`istanas config`: the resolved configuration, the explanation of every key, and the JSON schema for editors."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from istanas.methods import METHODS
from istanas.space import PRIMITIVES
from pipeline.cli.commands import run
from pipeline.config.describe import all_keys, describe, json_schema, sections
from pipeline.config.load import load, to_tree
from pipeline.config.schema import config_class
from tests.user_operations import SE_CONV, registered

Outcome = tuple[int, str, str]
Command = Callable[..., Outcome]
CONFIGURATIONS = sorted((Path(__file__).parents[3] / "tune_configs").glob("*.yaml"))


@pytest.fixture
def istanas(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `istanas config` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "80")

    def command(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = run(["config", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def values(tree: object, prefix: str = "") -> dict[str, object]:
    """Return a nested configuration as "key.path" -> value; a sweep's space is one value."""
    if not isinstance(tree, dict) or prefix == "sweep.space":
        return {prefix: tree}
    found: dict[str, object] = {}
    for name, below in tree.items():
        found |= values(below, f"{prefix}.{name}" if prefix else name)
    return found


# ---------- the resolved configuration
@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.stem)
def test_the_output_is_a_file_that_loads_to_the_same_configuration(
    istanas: Command, tmp_path: Path, file: Path
) -> None:
    settings = ("seed=7", "retrain.lr=0.0125", "data.root=/data/my pics #1")
    options = [word for setting in settings for word in ("--set", setting)]
    code, out, err = istanas("--config", str(file), *options)
    assert (code, err) == (0, "")
    written = tmp_path / "my.yaml"
    written.write_text(out)
    config = load(written)
    assert config == load(file, settings)
    assert (config.seed, config.retrain.lr, config.data.root) == (7, 0.0125, "/data/my pics #1")


def test_json_is_one_line_with_the_same_settings(istanas: Command) -> None:
    code, out, _ = istanas("--json", "--set", "search.epochs=3")
    assert code == 0
    assert len(out.splitlines()) == 1
    _, text, _ = istanas("--set", "search.epochs=3")
    assert json.loads(out)["config"] == YAML(typ="safe", pure=True).load(text)


def test_a_password_is_left_out_with_a_warning(istanas: Command) -> None:
    code, out, err = istanas("--set", "tracking.uri=http://me:secret@host:5000")
    assert code == 0
    assert "uri: http://host:5000\n" in out
    assert err == "warning: passwords in the addresses of stores are left out\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "search.epoch=3"], "did you mean epochs?"),
        (["--config", "nowhere.yaml"], "cannot be read"),
        (["--describe", "search.epochz"], "unknown key; did you mean search.epochs?"),
        (["--describe", "serach"], "unknown key; did you mean search?"),
        (["--describe", "seed", "--set", "seed=1"], "--describe does not take --set"),
        (["--json-schema", "--config", "a.yaml"], "--json-schema does not take --config"),
        (["--json-schema", "--describe", "seed"], "--describe does not take --json-schema"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    istanas: Command, arguments: list[str], says: str
) -> None:
    code, out, err = istanas(*arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_it_loads_neither_torch_nor_ray_nor_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.cli.commands import run\n"
        "assert run(['config', '--describe']) == run(['config']) == 0\n"
        "print([m for m in ('torch', 'mlflow', 'ray', 'optuna', 'cvxpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.splitlines()[-1] == "[]"


# ---------- the explanation
def test_every_key_of_a_configuration_is_described() -> None:
    described = {
        method: {
            key.path
            for key in all_keys()
            if (method if key.owner == "method" else "darts") in key.variants and ".KEY." not in key.path
        }
        for method in METHODS
    }
    sweep = "sweep={objective: retrained, space: {seed: {choice: [1, 2]}}}"
    for method in METHODS:
        config = load(None, [f"method={method}", sweep, "data.holdout=0.1"])
        assert set(values(to_tree(config))) == described[method]


def test_every_default_is_that_of_the_schema() -> None:
    """A stem is resolved for the digits, and therefore compared with the class itself."""
    for method in METHODS:
        expected = values(config_class(method)().model_dump(mode="json"))
        for key in all_keys():
            if method in key.variants and key.path in expected and key.path != "method":
                assert key.variants[method].default == expected[key.path], key.path


def test_every_key_and_section_has_a_meaning_in_sentences() -> None:
    keys = all_keys()
    assert len(keys) > 90
    texts = {key.path: variant.meaning for key in keys for variant in key.variants.values()} | sections()
    for path, text in texts.items():
        assert len(text.split()) >= 2, path
        assert text[0].isupper() or text.startswith("MLflow"), path
        assert text.endswith("."), path


@pytest.mark.parametrize(
    ("key", "lines"),
    [
        ("search.layers", ["  type: integer, at least 3", "  default (one_stage): 20"]),
        ("data.image_size", ["  type: integer, at least 8 (pixels), or null", "  default: null"]),
        ("search.second_order", ["search.second_order (method darts only)", "  type: true or false"]),
        ("search.alpha_fraction", ["  type: number in (0, 1)", "  default: 0.5"]),
        ("search.termination_tol", ["  type (two_stage): number, at least 0, or null"]),
        ("seed", ["  type: integer in [0, 2^63)", "  default: 0"]),
        ("runtime.workers", ["  type: integer, at least 0, or MIN:MAX"]),
        ("sweep.space.KEY.int", ["  type: list of 2 values, each an integer, or null"]),
        ("search.stages", ["  type: list of at least 1 value, each a list of 2 to 3 values, each an integer,"]),
        ("method", ["  default: two_stage"]),
    ],
)  # fmt: skip
def test_a_key_is_explained_with_range_unit_and_default(istanas: Command, key: str, lines: list[str]) -> None:
    code, out, err = istanas("--describe", key)
    assert (code, err) == (0, "")
    assert set(lines) <= set(out.splitlines())
    assert out.count("\n\n") == 0
    assert max(map(len, out.splitlines())) <= 80


def test_a_section_or_the_beginning_of_a_key_lists_its_keys() -> None:
    assert [key.path for key in describe("search.warm")] == ["search.warmup_epochs"]
    section = [key.path for key in describe("tracking")]
    assert section == [key.path for key in all_keys() if key.path.startswith("tracking.")]
    assert len(section) == 6
    assert describe() == all_keys()


def test_the_operations_are_those_of_the_search_space(istanas: Command) -> None:
    _, out, _ = istanas("--describe", "space.ops")
    assert set(PRIMITIVES) <= set(out.replace(",", " ").split())
    with registered(SE_CONV):
        text = " ".join(istanas("--describe", "space.ops")[1].split())
        assert "dil_conv_5x5 (istanas), se_conv_3x3 (my_ops.py)" in text
        tree = {"space": {"ops": ["se_conv_3x3", "sep_conv_3x3"]}}
        jsonschema.Draft202012Validator(json_schema()).validate(tree)
        assert load(None, ["space.ops=[se_conv_3x3]"]).space.ops == ["se_conv_3x3"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(json_schema()).validate(tree)


def test_the_explanation_for_programs(istanas: Command) -> None:
    code, out, _ = istanas("--describe", "search.layers", "--json")
    assert code == 0
    (key,) = json.loads(out)["keys"]
    assert key["key"] == "search.layers"
    defaults = {method: fact["default"] for method, fact in key["methods"].items()}
    assert list(defaults) == list(METHODS)
    assert (defaults["two_stage"], defaults["one_stage"]) == (8, 20)


# ---------- the schema for editors
@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.stem)
def test_the_schema_accepts_every_configuration_of_the_project(file: Path) -> None:
    tree = YAML(typ="safe", pure=True).load(file.read_text())
    errors = [error.message for error in jsonschema.Draft202012Validator(json_schema()).iter_errors(tree)]
    assert errors == []


@pytest.mark.parametrize(
    "tree",
    [
        {"search": {"epoch": 3}},
        {"search": {"epochs": 0}},
        {"search": {"train_epochs": 3}},
        {"method": "one_stage", "search": {"epochs": 3}},
        {"method": "three_stage"},
        {"space": {"ops": ["conv_7x1"]}},
        {"serach": {}},
        {"sweep": {"trials": 3}},
    ],
)
def test_the_schema_refuses_what_the_program_refuses(
    tree: dict[str, object], istanas: Command, tmp_path: Path
) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(json_schema()).validate(tree)
    (tmp_path / "wrong.yaml").write_text(json.dumps(tree))
    assert istanas("--config", str(tmp_path / "wrong.yaml"))[0] == 2


def test_the_schema_is_valid_and_its_command_prints_it(istanas: Command) -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    code, out, _ = istanas("--json-schema")
    assert code == 0
    assert json.loads(out) == json_schema()
    code, out, _ = istanas("--json-schema", "--json")
    assert len(out.splitlines()) == 1
