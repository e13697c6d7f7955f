"""Loading of configurations: invalid ones are one-line errors with file, field and remedy; valid ones have a hash."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from istanas.errors import ConfigError
from istanas.methods import METHODS
from istanas.search import CLOSING_EPOCHS
from istanas.space import PUBLISHED
from pipeline.config.load import (
    configuration_file,
    default_file,
    flat_params,
    known_methods,
    load,
    purpose,
    run_hash,
    shipped_files,
    to_tree,
    to_yaml,
    with_settings,
    with_stems,
)
from pipeline.config.schema import Config, config_class
from pipeline.config.workers import WorkerRange


def load_text(tmp_path: Path, text: str | bytes, *overrides: str) -> Config:
    file = tmp_path / "config.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(file, overrides)


def refusal(tmp_path: Path, text: str | bytes, *overrides: str) -> list[str]:
    """Return the lines of a configuration's error."""
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text, *overrides)
    return str(caught.value).split("\n")


# ---------- files
def test_an_empty_file_is_the_schemas_defaults(tmp_path: Path) -> None:
    assert load_text(tmp_path, "") == load(None) == with_stems(config_class()(), 8)


@pytest.mark.parametrize(
    ("text", "field", "hint"),
    [
        ("search: {epoch: 3}", "search.epoch", "did you mean epochs?"),
        ("serach: {}", "serach", "did you mean search?"),
        ("data: {xyzzy: 1}", "data.xyzzy", "choose from name, root"),
        ("retrain: {drop_path_prob: 0.2}", "retrain.drop_path_prob", "did you mean drop_path?"),
        ('"a\\nb": 2', "'a\\nb'", "choose from method, seed"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(
    tmp_path: Path, text: str, field: str, hint: str
) -> None:
    (line,) = refusal(tmp_path, text)
    assert line.startswith(f"{tmp_path / 'config.yaml'}: {field}: unknown key; ")
    assert hint in line


@pytest.mark.parametrize(
    ("text", "field", "value", "remedy"),
    [
        ("search: {epochs: ten}", "search.epochs", "'ten'", "valid integer"),
        ("search: {epochs: 2.5}", "search.epochs", "2.5", "valid integer"),
        ("search: {epochs: true}", "search.epochs", "True", "valid integer"),
        ("search: {epochs: null}", "search.epochs", "None", "valid integer"),
        ("search: {epochs: 0}", "search.epochs", "0", "greater than or equal to 1"),
        ("search: [1]", "search", "[1]", "not a section; give its keys"),
        ("search: {lr: 0}", "search.lr", "0", "greater than 0"),
        ("search: {lr: .nan}", "search.lr", "nan", "finite number"),
        ("search: {lr: .inf}", "search.lr", "inf", "finite number"),
        ("search: {momentum: 1.0}", "search.momentum", "1.0", "less than 1"),
        ("search: {arch_betas: [0.5]}", "search.arch_betas", "[0.5]", "at least 2"),
        ("search: {arch_betas: [0.5, 2]}", "search.arch_betas.1", "2", "less than 1"),
        ("search: {stem: resnet}", "search.stem", "'resnet'", "'cifar' or 'imagenet'"),
        ("space: {ops: [conv_7x1]}", "space.ops.0", "'conv_7x1'", "skip_connect"),
        ("space: {ops: [sep_conv_3]}", "space.ops.0", "'sep_conv_3'", "(did you mean sep_conv_3x3?)"),
        ("space: {ops: [3]}", "space.ops.0", "3", "valid string"),
        ("space: {ops: sep_conv_3x3}", "space.ops", "'sep_conv_3x3'", "valid list"),
        ("space: {solver: lars}", "space.solver", "'lars'", "'homotopy'"),
        ("space: {l1_weight: -1}", "space.l1_weight", "-1", "greater than 0"),
        ("data: {name: imagenet21k}", "data.name", "'imagenet21k'", "folder"),
        ("data: {holdout: 1}", "data.holdout", "1", "less than 1"),
        ("data: {root: 5}", "data.root", "5", "valid string"),
        ("data: {image_size: 4}", "data.image_size", "4", "greater than or equal to 8"),
        ("data: {horizontal_flip: 1}", "data.horizontal_flip", "1", "valid boolean"),
        ("seed: -1", "seed", "-1", "greater than or equal to 0"),
        ("seed: 9223372036854775808", "seed", "9223372036854775808", "less than"),
        ("method: dart", "method", "'dart'", "choose from two_stage, one_stage"),
        ("runtime: {threads: 0}", "runtime.threads", "0", "greater than or equal to 1"),
        ("runtime: {workers: many}", "runtime.workers", "'many'", "give a number or MIN:MAX"),
        ("runtime: {workers: -1}", "runtime.workers", "-1", "give a number or MIN:MAX"),
        ("runtime: {workers: 2.5}", "runtime.workers", "2.5", "give a number or MIN:MAX"),
        ("runtime: {workers: true}", "runtime.workers", "True", "give a number or MIN:MAX"),
        ("runtime: {workers: '4:1'}", "runtime.workers", "'4:1'", "give a number or MIN:MAX"),
        ("runtime: {workers: '0:2'}", "runtime.workers", "'0:2'", "give a number or MIN:MAX"),
        ("runtime: {address: 5}", "runtime.address", "5", "valid string"),
        ("runtime: {wait_minutes: -1}", "runtime.wait_minutes", "-1", "greater than or equal to 0"),
        ("runtime: {wait_minutes: .inf}", "runtime.wait_minutes", "inf", "finite number"),
        ("runtime: {max_failures: -1}", "runtime.max_failures", "-1", "greater than or equal to 0"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_named(
    tmp_path: Path, text: str, field: str, value: str, remedy: str
) -> None:
    (line,) = refusal(tmp_path, text)
    assert line.startswith(f"{tmp_path / 'config.yaml'}: {field}: {value} is ")
    assert remedy in line


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("search: {lr: 0.0001}", ["search.lr_min", "search.lr"]),
        ("retrain: {lr_min: 1.0}", ["retrain.lr_min", "retrain.lr"]),
        ("data: {image_size: 65}", ["data.image_size: 65", "at most 64"]),
        ("search: {stem: imagenet, init_channels: 1}", ["search.init_channels", "imagenet"]),
        ("retrain: {epochs: 5, warmup_epochs: 5}", ["retrain.warmup_epochs", "retrain.epochs"]),
        ("retrain: {nesterov: true, momentum: 0.0}", ["retrain.nesterov", "retrain.momentum"]),
        ("data: {name: folder}", ["data.root", "--set data.root=DIR"]),
        ("runtime: {device: cpu, precision: bf16}", ["runtime.precision", "runtime.device"]),
        ("runtime: {address: auto}", ["runtime.address", "runtime.workers: 0", "give --workers N"]),
        ("runtime: {address: auto, workers: 0}", ["runtime.address", "give --workers N"]),
        # The first node has two edges in, so three single-op edges cannot be kept.
        ("space: {one_op_per_edge: true, sparsity: 3}", ["sparsity", "3", "edges"]),
        ("space: {ops: [skip_connect], sparsity: 3}", ["sparsity", "3"]),
        ("space: {ops: []}", ["ops"]),
        ("space: {ops: [skip_connect, skip_connect]}", ["ops", "skip_connect"]),
    ],
)
def test_what_cannot_be_combined_is_named_with_a_remedy(tmp_path: Path, text: str, fields: list[str]) -> None:
    (line,) = refusal(tmp_path, text)
    assert line.startswith(f"{tmp_path / 'config.yaml'}: ")
    for field in fields:
        assert field in line


def test_every_mistake_has_its_line(tmp_path: Path) -> None:
    lines = refusal(tmp_path, "search: {epoch: 3, lr: x}\nretrain: {layers: 0}")
    assert len(lines) == 3
    assert [line.split(": ")[1] for line in lines] == ["search.lr", "search.epoch", "retrain.layers"]
    lines = refusal(tmp_path, "search: {lr_min: 1.0}\nretrain: {lr_min: 1.0}")
    assert [line.split(": ")[1] for line in lines] == ["search.lr_min", "retrain.lr_min"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("search:\n  epochs: 3\n  epochs: 4\n", "duplicate key"),
        ("seed: 1\nseed: 1\n", "duplicate key"),
        ("seed: [1", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("\tseed: 1", "not valid YAML"),
        (b"\x89PNG\r\n\x1a\n\x00\xff\xfe", "not valid YAML"),
        (b"\xff\xfeseed", "not valid YAML"),
        ("- seed\n- 1\n", "contains a list; give sections"),
        ("seed", "contains a str; give sections"),
        ("3", "contains a int; give sections"),
        ("1: 2", "1: 1 is invalid: keys should be strings"),
        ("search: {null: 2}", "search.None: None is invalid: keys should be strings"),
        ("seed: 1\n---\nseed: 2\n", "not valid YAML"),
        ("? [a, b]\n: 1\n", "config.yaml"),
        ("[" * 3000, "not valid YAML"),
        ("search: {[[lr]]: 1}", "not valid YAML: a key is a list or a section"),
    ],
)
def test_what_is_no_configuration_file_is_refused_in_one_line(
    tmp_path: Path, text: str | bytes, says: str
) -> None:
    (line,) = refusal(tmp_path, text)
    assert line.startswith(str(tmp_path / "config.yaml"))
    assert says in line


def test_a_file_that_is_not_there_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(
            ConfigError, match=r"cannot be read \(.*\); give an existing YAML file$"
        ) as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "call",
    [
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{target}]]",
        "!!python/object/new:os.mkdir [{target}]",
        "!!python/name:os.system",
        "!!python/object/apply:os.mkdir [{target}]",
    ],
)
def test_no_tag_ever_runs_code(tmp_path: Path, call: str) -> None:
    target = tmp_path / "executed"
    value = call.format(target=target)
    assert "not valid YAML" in refusal(tmp_path, f"seed: {value}")[0]
    with pytest.raises(ConfigError, match="not YAML"):
        load(None, [f"seed={value}"])
    assert not target.exists()


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    config = load_text(tmp_path, "search: {lr: 1e-1, lr_min: 1e-3, weight_decay: 0, arch_lr: 6E-4}")
    assert (config.search.lr, config.search.lr_min, config.search.arch_lr) == (0.1, 0.001, 6e-4)
    assert config.search.weight_decay == 0
    # YAML 1.1 would read `on` as true; here it is a string, which is invalid.
    assert "valid boolean" in refusal(tmp_path, "data: {horizontal_flip: on}")[0]


# ---------- overrides
def test_overrides_change_single_settings_in_order(tmp_path: Path) -> None:
    config = load_text(
        tmp_path,
        "search: {epochs: 3, lr: 0.2}",
        "search.epochs=5",
        "search.epochs=7",
        "retrain.grad_clip=null",
        "space.ops=[skip_connect, sep_conv_3x3]",
        "search.lr_min=1e-4",
        "data.root=/some/where=else",
        "runtime={threads: 2}",
        "data.horizontal_flip=true",
    )
    assert (config.search.epochs, config.search.lr, config.search.lr_min) == (7, 0.2, 1e-4)
    assert config.retrain.grad_clip is None
    assert config.space.ops == ["skip_connect", "sep_conv_3x3"]
    assert config.data.root == "/some/where=else"
    assert config.runtime.threads == 2
    assert config.data.horizontal_flip is True


def test_an_override_reaches_into_a_section_that_is_there_without_keys(tmp_path: Path) -> None:
    assert load_text(tmp_path, "search:\n", "search.epochs=2").search.epochs == 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("search.epochs", "not of the form key.path=value"),
        ("=3", "not of the form key.path=value"),
        ("search..epochs=3", "not of the form key.path=value"),
        (".epochs=3", "not of the form key.path=value"),
        ("", "not of the form key.path=value"),
        ("search.epochs=[1", "not YAML"),
        ("seed=a: b: c", "not YAML"),
        ("seed.deeper=3", "seed: a value, not a section"),
        ("search.epochs=ten", "search.epochs: 'ten' is invalid"),
        ("search.epoch=3", "did you mean epochs?"),
        ("search.epochs=", "search.epochs: None is invalid"),
        ("__class__.x=3", "__class__: unknown key"),
        ("retrain.mixup=1e-300", "retrain.mixup: 1e-300 is no usual parameter of a Beta distribution"),
        ("retrain.cutmix=1e300", "use 0 to disable it, or 0.001 to 100"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(tmp_path: Path, override: str, says: str) -> None:
    (line,) = refusal(tmp_path, "seed: 1", override)
    assert says in line


@pytest.mark.parametrize(
    ("overrides", "starts", "says"),
    [
        (["serach.epochs=3"], "--set 'serach.epochs=3': serach", "did you mean search?"),
        (["serach.a.b=3"], "--set 'serach.a.b=3': serach", "did you mean search?"),
        (["sweep.trials=2"], "--set 'sweep.trials=2': ", "has no sweep section; give --config"),
        (["search.lr=1e-9"], "--set 'search.lr=1e-9': search.lr_min: 0.001 is above", "lower it"),
        (["space.sparsity=99"], "--set 'space.sparsity=99': space.sparsity: 99", "choose 1 to"),
        (
            ["method=one_stage"],
            "--set 'method=one_stage': ",
            "search.alpha_fraction, which belongs to another",
        ),
        (["method=one_stage", "seed=2"], "--set 'method=one_stage': ", "one_stage_digits.yaml"),
    ],
)
def test_the_override_is_blamed_not_the_file(
    tmp_path: Path, overrides: list[str], starts: str, says: str
) -> None:
    (line,) = refusal(tmp_path, "search: {alpha_fraction: 0.4}", *overrides)
    assert line.startswith(starts)
    assert says in line


def test_a_section_that_stands_in_the_file_is_the_files_mistake(tmp_path: Path) -> None:
    (line,) = refusal(tmp_path, "serach: {lr: 1}", "serach.epochs=3")
    assert line.startswith(f"{tmp_path / 'config.yaml'}: serach: unknown key")


def test_the_shipped_file_is_called_that_when_none_is_given() -> None:
    with pytest.raises(ConfigError, match="without --config the settings come from") as caught:
        load(default_file(), ["method=one_stage"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "override", "where"),
    [
        ("seed: 1\nsearch: [1", "seed=1", "line 2, column 11: expected ',' or ']'"),
        ("a: 1\na: 2", "seed=1", 'line 2, column 1: found duplicate key "a"'),
        ("a: \x07", "seed=1", "not valid YAML"),
        ("seed: 1", "search.epochs=[1", "line 1, column 3: expected"),
    ],
)
def test_a_yaml_error_says_where_it_is(tmp_path: Path, text: str, override: str, where: str) -> None:
    (line,) = refusal(tmp_path, text, override)
    assert where in line
    assert "<unicode string>" not in line
    assert "yaml.dev" not in line


def test_a_seed_of_zero_is_a_seed(tmp_path: Path) -> None:
    config = load_text(tmp_path, "seed: 5", "seed=0")
    assert config.seed == 0
    assert load_text(tmp_path, "seed: 5", "space.matrix_seed=0").matrix_seed == 0
    assert load_text(tmp_path, "seed: 5").matrix_seed == 5


# ---------- workers
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("0", WorkerRange(0, 0)),
        ("3", WorkerRange(3, 3)),
        ("'3'", WorkerRange(3, 3)),
        ("1:4", WorkerRange(1, 4)),
        ("'2:2'", WorkerRange(2, 2)),
    ],
)
def test_workers_are_a_number_or_a_range_in_file_and_override(
    tmp_path: Path, written: str, expected: WorkerRange
) -> None:
    for config in (
        load_text(tmp_path, f"runtime: {{workers: {written}}}"),
        load_text(tmp_path, "seed: 0", f"runtime.workers={written}"),
    ):
        assert config.runtime.worker_range == expected
        assert load_text(tmp_path, to_yaml(config)) == config


def test_an_address_with_workers_is_accepted(tmp_path: Path) -> None:
    config = load_text(tmp_path, "runtime: {address: 'ray://head:10001', workers: 2}")
    assert config.runtime.address == "ray://head:10001"
    assert config_class()().runtime.worker_range == WorkerRange(0, 0)


# ---------- random trees: a ConfigError or a configuration, nothing else
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["digits", "folder", "cifar", "skip_connect"])
)
KEYS = st.sampled_from(
    [
        f
        for s in (Config, *(m.annotation for m in Config.model_fields.values()))
        for f in getattr(s, "model_fields", ())
    ]
) | st.text(max_size=5)
ANY_KEYS = KEYS | st.integers() | st.booleans() | st.none()
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_KEYS, inner, max_size=4),
    max_leaves=12,
)


def one_line_each(error: ConfigError, source: str | tuple[str, ...]) -> None:
    """Check that each mistake is one printable line, whatever characters the keys and values contain."""
    for line in str(error).split("\n"):
        assert line.startswith(source), repr(str(error))
        assert line.isprintable(), repr(line)


@given(st.dictionaries(ANY_KEYS, TREES, max_size=4))
@settings(max_examples=150)
def test_a_random_tree_is_refused_or_loads(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]
) -> None:
    from ruamel.yaml import YAML

    file = tmp_path_factory.getbasetemp() / "random_tree.yaml"
    with file.open("w", encoding="utf-8") as stream:
        YAML(typ="safe", pure=True).dump(tree, stream)
    try:
        assert isinstance(load(file), Config)
    except ConfigError as error:
        one_line_each(error, f"{file}: ")


@given(
    st.text(max_size=60)
    | st.text(alphabet="seach: {}[]!&*?|>-'\"\n\t#%@`,0.e", max_size=60)
    | st.binary(max_size=40)
)
@settings(max_examples=200)
def test_a_random_file_and_a_random_override_are_refused_or_load(
    tmp_path_factory: pytest.TempPathFactory, text: str | bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "random_text.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    arguments: list[tuple[Path | None, list[str]]] = [(file, [])]
    if isinstance(text, str):
        arguments += [(None, [text]), (None, [f"seed={text}"])]
    for path, overrides in arguments:
        try:
            assert isinstance(load(path, overrides), Config)
        except ConfigError as error:
            one_line_each(error, ("--set ", "command line: ") if overrides else f"{file}: ")


# ---------- round trip and hash
def test_a_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load(
        None,
        [
            "seed=3",
            "space.ops=[skip_connect, dil_conv_5x5]",
            "search.grad_clip=null",
            "search.lr=0.3",
            "search.arch_betas=[0.25, 0.75]",
            "data={name: folder, root: 'a: \"b\" #c', image_size: 16}",
            "tracking.name='null'",
            "space.l1_weight=1e-7",
            f"seed={2**63 - 1}",
        ],
    )
    assert load_text(tmp_path, to_yaml(config)) == config
    assert load_text(tmp_path, to_yaml(load(None))) == load(None)


DEFAULTS: dict[str, Config] = {"two_stage": config_class()(), "one_stage": config_class("one_stage")()}
NAMES = ("data", "space", "search", "retrain", "runtime", "tracking")
ANOTHER = {
    "data.name": "mnist",
    "data.root": "elsewhere",
    "data.download": True,
    "data.test_fraction": 0.2,
    "data.image_size": 16,
    "data.cache_dir": "elsewhere",
    "data.background": "#000000",
    "data.allow_left_out": True,
    "data.holdout": 0.1,
    "data.crop_padding": 1,
    "data.horizontal_flip": True,
    "data.reduced_decoding": True,
    "space.nodes": 3,
    "space.ops": ["skip_connect", "sep_conv_3x3"],
    "space.sparsity": 1,
    "space.one_op_per_edge": True,
    "space.n_measurements": 9,
    "space.matrix": "gaussian",
    "space.matrix_seed": 1,
    "space.l1_weight": 1e-4,
    "space.solver": "fista",
    "search.epochs": 1,
    "search.batch_size": 1,
    "search.init_channels": 1,
    "search.layers": 3,
    "search.stem": "imagenet",
    "search.lr": 1.0,
    "search.lr_min": 1e-4,
    "search.momentum": 0.1,
    "search.weight_decay": 0.0,
    "search.grad_clip": None,
    "search.arch_lr": 1.0,
    "search.arch_betas": [0.1, 0.2],
    "search.arch_weight_decay": 0.0,
    "search.max_pictures": 10,
    "search.alpha_fraction": 0.4,
    "search.cutout": 2,
    "search.termination_tol": 1e-2,
    "search.max_search_epochs": 1,
    "search.schedule": "linear",
    "search.warmup_epochs": 1.0,
    "search.label_smoothing": 0.1,
    "search.train_epochs": 0,
    "search.auxiliary_weight": 0.0,
    "search.drop_path": 0.0,
    "search.max_params": 123_456,
    "search.cost": "params",
    "search.cost_weight": 0.5,
    "search.over_limit": "reweigh",
    "search.max_macs": 10**9,
    "search.max_latency_ms": 5.0,
    "search.latency_table": "elsewhere",
    "search.test_every": 2,
    "retrain.epochs": 1,
    "retrain.batch_size": 1,
    "retrain.init_channels": 1,
    "retrain.layers": 1,
    "retrain.stem": "imagenet",
    "retrain.lr": 1.0,
    "retrain.lr_min": 1e-3,
    "retrain.schedule": "linear",
    "retrain.warmup_epochs": 2.0,
    "retrain.momentum": 0.1,
    "retrain.nesterov": True,
    "retrain.weight_decay": 0.0,
    "retrain.grad_clip": None,
    "retrain.auxiliary_weight": 0.0,
    "retrain.drop_path": 0.0,
    "retrain.label_smoothing": 0.1,
    "retrain.cutout": 0,
    "retrain.color_jitter": False,
    "retrain.rand_augment": 9,
    "retrain.random_erasing": 0.1,
    "retrain.mixup": 0.2,
    "retrain.cutmix": 1.0,
    "retrain.ema_decay": 0.999,
    "retrain.op_batchnorm": True,
    "retrain.test_every": 2,
    "runtime.device": "cpu",
    "runtime.precision": "fp32",
    "runtime.threads": 1,
    "runtime.activation_checkpointing": True,
    "runtime.compile": True,
    "space.name": "another",
    "runtime.data_workers": 1,
    "runtime.workers": "1:4",
    "runtime.address": "elsewhere",
    "runtime.wait_minutes": 1.0,
    "runtime.max_failures": 0,
    "runtime.on_nan": "rollback",
    "runtime.max_rollbacks": 0,
    "runtime.max_loss": None,
    "runtime.runs_dir": "elsewhere",
    "tracking.enabled": False,
    "tracking.uri": "http://elsewhere",
    "tracking.experiment": "elsewhere",
    "tracking.name": "elsewhere",
    "tracking.models": False,
    "tracking.registered_model": "elsewhere",
}
KEY_PATHS = [
    (method, f"{name}.{key}")
    for method, config in DEFAULTS.items()
    for name in NAMES
    for key in type(getattr(config, name)).model_fields
]


NOT_DECISIVE = ("data.download", "data.cache_dir", "data.allow_left_out")


@pytest.mark.parametrize(("method", "path"), KEY_PATHS)
def test_the_hash_follows_exactly_what_decides_the_result(method: str, path: str) -> None:
    name, key = path.split(".")
    assert path in ANOTHER, (
        "a new setting: give it another value here, and decide whether it belongs in the hash"
    )
    before = DEFAULTS[method]
    section = getattr(before, name).model_copy(update={key: ANOTHER[path]})
    after = before.model_copy(update={name: section})
    assert after != before
    decides = {
        "search": name in ("data", "space", "search") and path not in NOT_DECISIVE,
        # The networks of the DARTS space depend on nothing but the genotype; those of other spaces on all its settings.
        "retrain": (name in ("data", "retrain") and path not in NOT_DECISIVE) or path == "space.name",
    }
    for job, changes in decides.items():
        assert (run_hash(before, job) != run_hash(after, job)) == changes, job


def test_a_search_with_costs_depends_on_the_size_of_the_retraining() -> None:
    """Its costs are those of the network of the retraining. Without costs, the size has no influence."""
    for override, depends in (
        ("search.cost_weight=0.5", True),
        ("search.max_macs=100", True),
        ("search.latency_table=elsewhere", True),
        ("seed=0", False),
    ):
        one, other = (load(None, [override, f"retrain.init_channels={width}"]) for width in (8, 16))
        assert (run_hash(one, "search") != run_hash(other, "search")) == depends
    one, other = (load(None, ["search.max_macs=100", f"retrain.lr={lr}"]) for lr in (0.1, 0.2))
    assert run_hash(one, "search") == run_hash(other, "search")


def test_the_hash_depends_on_seed_genotype_and_job_not_on_path_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_class()()
    for job in ("search", "retrain"):
        assert run_hash(config, job) != run_hash(load(None, ["seed=1"]), job)
        assert len(run_hash(config, job)) == 10
    assert run_hash(config, "search") != run_hash(config, "retrain")
    cells = [genotype.to_json() for genotype in PUBLISHED.values()]
    assert len({run_hash(config, "retrain", genotype=cell) for cell in cells}) == len(cells) == 3
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    written = ["pictures", "./pictures", "pictures/../pictures", str(tmp_path / "pictures")]
    assert len({run_hash(load(None, [f"data.root={p}"]), "search") for p in written}) == 1


def test_parameters_for_mlflow_are_flat_and_of_the_job_alone() -> None:
    params = flat_params(config_class()(), ("data", "retrain"))
    assert params["retrain.lr"] == 0.025
    assert params["seed"] == 0
    assert not any(key.startswith(("search.", "tracking.")) for key in params)
    assert flat_params(config_class()(), ("search",))["search.arch_betas"] == "0.5,0.999"


@pytest.mark.parametrize(
    ("text", "field", "hint"),
    [
        ("search: {max_search_epochs: 3}", "search.max_search_epochs", "it belongs to method: one_stage"),
        ("method: one_stage\nsearch: {alpha_fraction: 0.5}", "search.alpha_fraction", "method: two_stage"),
        ("method: one_stage\nsearch: {train_epoch: 1}", "search.train_epoch", "did you mean train_epochs?"),
        ("method: one_stage\nsearch: {termination_tol: null}", "search.termination_tol", "valid number"),
        ("method: one_stage\nsearch: {max_params: 0}", "search.max_params", "greater than or equal to 1"),
        ("method: [one_stage]", "method", "choose from two_stage, one_stage"),
        ("method: onestage\nsearch: {train_epochs: 1}", "method", "choose from two_stage, one_stage"),
    ],
)
def test_a_key_of_the_other_method_is_sent_there(tmp_path: Path, text: str, field: str, hint: str) -> None:
    (line,) = refusal(tmp_path, text)
    assert f": {field}: " in line
    assert hint in line


def test_a_one_stage_configuration_survives_its_yaml(tmp_path: Path) -> None:
    config = load(None, ["method=one_stage", "search.max_macs=5", "search.max_params=null"])
    assert config.method == "one_stage"
    assert load_text(tmp_path, to_yaml(config)) == config
    assert config.search.max_epochs == 600 + CLOSING_EPOCHS + 600
    assert run_hash(config, "search") != run_hash(config_class()(), "search")


def test_the_default_is_the_quickstart(repo_root: Path) -> None:
    assert default_file() == repo_root / "tune_configs" / "digits_quickstart.yaml"
    assert load(default_file()).data.name == "digits"


@pytest.mark.parametrize(
    "override",
    [
        "tracking={uri: [http://me:hunter2@host]}",
        "sweep.storage=postgresql://host/db?password=hunter2",
        "runtime.address=ray://me:hunter2@host:10001",
        "runtime.runs_dir=s3://key:hunter2@bucket/runs",
    ],
)
def test_a_refusal_shows_no_password(override: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(None, [override])
    assert "hunter2" not in str(refused.value)


# ---------- hashes of earlier versions, stems by the pictures' size, text as it is written


@pytest.mark.parametrize(
    ("file", "overrides", "job", "extra", "digits"),
    [
        ("digits_quickstart", [], "search", {}, "bce133e769"),
        ("digits_quickstart", [], "retrain", {"genotype": "g"}, "1d4801f724"),
        (
            "digits_quickstart",
            ["retrain.stem=cifar", "data.background=white"],
            "retrain",
            {"genotype": "g"},
            "1d4801f724",
        ),
        ("sweep_digits", [], "sweep", {}, "cadc31ffe1"),
        (
            "retrain_imagenet",
            [
                "data.root=/data/imagenet",
                "retrain.schedule=linear",
            ],  # the schedule of the file has changed since
            "retrain",
            {"genotype": "g"},
            "6a26769e6f",
        ),
        (None, ["data.name=folder", "data.root=/data/x", "data.image_size=32"], "search", {}, "1a26367770"),
    ],
)
def test_runs_of_version_0_1_keep_their_hash(
    file: str | None, overrides: list[str], job: str, extra: dict[str, str], digits: str
) -> None:
    path = None if file is None else default_file().with_name(f"{file}.yaml")
    assert run_hash(load(path, overrides), job, **extra) == digits


def test_another_background_is_another_run() -> None:
    before, after = (load(None, [f"data.background={colour}"]) for colour in ("white", "#000"))
    assert (before.data.background, after.data.background) == ("#ffffff", "#000000")
    assert run_hash(before, "search") != run_hash(after, "search")
    with pytest.raises(ConfigError, match=r"data\.background: 'whitish' is not a colour; name a colour"):
        load(None, ["data.background=whitish"])
    for colour in ("#ffffff00", "#fff0", "rgba(255, 255, 255, 0)", "#ffffffff"):
        with pytest.raises(ConfigError, match=r"data\.background: .*give its colour as #rrggbb") as refusal:
            load(None, [f"data.background={colour}"])
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("overrides", "stem"),
    [
        ([], "cifar"),
        (["data.image_size=64"], "cifar"),
        (["data.name=mnist"], "cifar"),
        (["data.name=folder", "data.root=photos", "data.image_size=64"], "cifar"),
        (["data.name=folder", "data.root=photos", "data.image_size=65"], "imagenet"),
        (["data.name=folder", "data.root=photos"], "auto"),
        (["data.name=folder", "data.root=photos", "search.stem=imagenet"], "imagenet"),
    ],
)
def test_the_stem_follows_the_size_of_the_pictures(overrides: list[str], stem: str) -> None:
    config = load(None, overrides)
    assert config.search.stem == stem
    assert with_stems(config, 224).search.stem == (stem if stem != "auto" else "imagenet")
    assert with_stems(config, 16).search.stem == (stem if stem != "auto" else "cifar")


def test_a_trial_with_larger_pictures_has_their_stem() -> None:
    config = load(None, ["data.name=folder", "data.root=photos", "data.image_size=32"])
    assert with_settings(config, {"data.image_size": 96}, "trial").retrain.stem == "imagenet"
    fixed = load(None, ["data.name=folder", "data.root=photos", "data.image_size=32", "retrain.stem=cifar"])
    assert with_settings(fixed, {"data.image_size": 96}, "trial").retrain.stem == "cifar"
    written = load(None, ["data.name=folder", "data.root=photos"])
    assert with_settings(with_stems(written, 16), {"data.image_size": 96}, "trial").search.stem == "imagenet"


def test_a_network_too_narrow_for_the_stem_is_refused() -> None:
    folder = ["data.name=folder", "data.root=photos", "search.init_channels=1"]
    with pytest.raises(
        ConfigError, match=r"search\.init_channels: 1 is too small for the stem of pictures of 96x96"
    ):
        load(None, [*folder, "data.image_size=96"])
    with pytest.raises(
        ConfigError, match=r"search\.init_channels: 1 is too small for the stem of pictures of 224x224"
    ):
        with_stems(load(None, folder), 224)


@pytest.mark.parametrize("key", ["data.root", "data.cache_dir", "runtime.runs_dir", "tracking.name"])
@pytest.mark.parametrize(
    "text",
    ["/data/my pics #1", "123", "2024-01-01", "@eaDir", "[x]", "{a: b}", "a: b", "1e3", "true", "*x", "&x", "!x", "-",
     " x", "it's", '"half', "caf\u00e9", "100%", "|", ">"],
)  # fmt: skip
def test_text_is_taken_as_it_is_written(key: str, text: str, tmp_path: Path) -> None:
    if key == "tracking.name" and "/" in text:
        pytest.skip("a run's name is the name of a folder, and has no slash")
    config = load(None, [f"{key}={text}"])
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == text
    assert load_text(tmp_path, to_yaml(config)) == config


def test_text_may_be_nothing_or_in_quotes() -> None:
    for nothing in ("", "null"):
        assert load(None, [f"data.root={nothing}"]).data.root is None
    for quoted in ("'a #b'", '"a #b"'):
        assert load(None, [f"data.root={quoted}"]).data.root == "a #b"
    for written in ("~", "'a' and 'b'"):
        assert load(None, [f"data.root={written}"]).data.root == written
    with pytest.raises(ConfigError, match=r"data\.root: 5 is invalid: .*; put it in quotes"):
        load(None, ["data={root: 5}"])


def test_text_that_is_not_utf8_is_refused_in_printable_words() -> None:
    with pytest.raises(ConfigError, match=r"--set data\.root: 'caf\\udce9' is not UTF-8") as caught:
        load(None, ["data.root=caf\udce9"])
    str(caught.value).encode()


@pytest.mark.parametrize("key", ["search", "retrain", "data", "runtime"])
def test_a_value_in_the_place_of_a_section_says_what_a_section_is(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [f"{key}=3"])
    line = str(caught.value)
    assert line.startswith(f"--set '{key}=3': {key}: 3 is not a section; give its keys, such as {key}.")
    assert known_methods(line.rpartition(" ")[2])


@pytest.mark.parametrize("method", [name for name in METHODS if load(None, [f"method={name}"]).search.trains])
def test_a_search_section_of_another_length_is_a_valid_section(method: str) -> None:
    config = load(None, [f"method={method}"])
    section = config.search.lasting(30)
    if section is None:
        assert config.trains_target
        return
    changed = config.model_copy(update={"search": section})
    assert load(None, [], to_tree(changed)) == changed
    assert changed.search.max_epochs != config.search.max_epochs


# ---------- configurations that the package contains
def test_a_name_selects_a_shipped_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert configuration_file("random_digits") == shipped_files()["random_digits"]
    assert load(configuration_file("random_digits")).method == "random"
    (tmp_path / "random_digits").write_text("method: gdas")
    assert load(configuration_file("random_digits")).method == "gdas", "a file in the working directory"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("random_digit", "did you mean random_digits?"),
        ("random-digits", "did you mean random_digits?"),
        ("xyz", "istanas config --list shows those of istanas"),
    ],
)
def test_an_unknown_name_has_a_remedy(name: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        configuration_file(name)
    problem = "neither a file nor a configuration of istanas"
    assert str(error.value) == f"configuration '{name}': {problem}; {remedy}"


def test_every_shipped_configuration_says_what_it_is_for() -> None:
    for name, file in shipped_files().items():
        assert 20 < len(purpose(file)) < 250, name
