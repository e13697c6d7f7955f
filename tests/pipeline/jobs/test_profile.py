"""`istanas profile`: shares of the time, FLOPs counted by hand, and the formula of the projection."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from istanas.measure import count_macs
from istanas.nets import TargetNet
from istanas.nets.depthwise import DepthwiseConv2d
from istanas.space import PUBLISHED
from istanas.training import Compute
from pipeline.cli.commands import run
from pipeline.config.load import load
from pipeline.jobs import profile as profile_job
from pipeline.jobs.profile import make_work
from pipeline.training import profiling
from pipeline.training.pictures import open_dataset
from pipeline.training.profiling import count_flops, kind_of, step_seconds, time_by_kind

CPU = torch.device("cpu")
CONFIGS = Path(__file__).resolve().parents[3] / "tune_configs"
RETRAIN = ("--genotype", "ISTA_twostage", "--set", "retrain.auxiliary_weight=0")
# The digits have 1438 training pictures (halved by a two-stage search) and 359 test pictures.
RUNS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "two-stage": (
        ("--config", str(CONFIGS / "digits_quickstart.yaml")),
        {
            "epochs": 12,
            "steps_per_epoch": 12,
            "recoveries": 12,
            "measured_pictures": 12 * 719,
            "upper_bound": False,
        },
    ),
    "one-stage": (
        ("--config", str(CONFIGS / "one_stage_digits.yaml"), "--set", "data.holdout=0.1"),
        {
            "epochs": 10 + 1 + 25,
            "steps_per_epoch": 21,  # of 1294 pictures, a last batch of 14
            "recoveries": 10,
            "measured_pictures": 36 * 144 + 5 * 359,
            "upper_bound": True,
        },
    ),
    "retraining": (
        (*RETRAIN, "--set", "retrain.test_every=6"),
        {
            "epochs": 20,
            "steps_per_epoch": 23,
            "recoveries": 0,
            "measured_pictures": 4 * 359,
            "upper_bound": False,
        },
    ),
}
KINDS = {
    "1x1 convolution, forward",
    "1x1 convolution, backward",
    "depthwise convolution, forward",
    "depthwise convolution, backward",
    "other convolution, forward",
    "batch norm",
    "pooling",
    "elementwise and copies",
    "optimiser and clipping",
    "data and augmentation",
    "Python between operations",
    "other",
}

Outcome = tuple[int, str, str]
Command = Callable[..., Outcome]


@pytest.fixture
def istanas(tmp_path: Path) -> Command:
    """Runs a command line in an empty folder: (exit code, stdout, stderr).

    In its own process, since the messages of the profiler's library depend on what was profiled before.
    """
    command_line = [sys.executable, "-m", "pipeline.cli", "profile"]

    def command(*arguments: str) -> Outcome:
        done = subprocess.run([*command_line, *arguments], cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return command


@pytest.fixture
def in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """As `istanas`, in this process, if stderr is that of an error or not examined: a new one imports torch again."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> Outcome:
        code = run(["profile", *arguments])
        return code, *capfd.readouterr()

    return command


# ---------- the command
@pytest.mark.parametrize("name", RUNS)
def test_a_profile_adds_up(istanas: Command, in_this_process: Command, tmp_path: Path, name: str) -> None:
    arguments, plan = RUNS[name]
    command = istanas if name == "one-stage" else in_this_process
    code, out, err = command(*arguments, "--steps", "1", "--json")
    assert code == 0, err
    result = json.loads(out)

    assert sum(kind["share"] for kind in result["kinds"]) == pytest.approx(1)
    assert {kind["kind"] for kind in result["kinds"]} >= KINDS
    assert all(0 < kind["share"] < 1 for kind in result["kinds"])
    seconds = [kind["seconds_per_step"] for kind in result["kinds"]]
    assert seconds == sorted(seconds, reverse=True)
    assert result["clock"] == "cpu"

    projection = result["projection"]
    assert {key: projection[key] for key in plan} == plan
    assert projection["seconds_per_step"] == result["seconds_per_step"] > 0
    assert projection["seconds"] == pytest.approx(
        projection["epochs"] * projection["steps_per_epoch"] * projection["seconds_per_step"]
        + projection["recoveries"] * projection["seconds_per_recovery"]
        + projection["measured_pictures"] * projection["seconds_per_measured_picture"]
    )
    assert (projection["seconds_per_recovery"] > 0) == (name != "retraining")
    assert projection["seconds_per_measured_picture"] > 0

    assert result["pictures_per_step"] == (128 if name == "two-stage" else 64)
    per_second = result["pictures_per_step"] / result["seconds_per_step"]
    assert result["pictures_per_second"] == pytest.approx(per_second)
    assert result["flops_per_second"] == pytest.approx(result["flops_per_step"] / result["seconds_per_step"])
    assert 0 < result["peak_share"] < 1
    assert 0 < result["waiting_share"] < 1
    peak = result["flops_per_second"] / result["peak_share"]
    assert result["peak_flops_per_second"] == pytest.approx(peak)

    assert "at most" in err or name != "one-stage"
    if command is istanas:
        assert not any(word in err for word in ("ERROR", "USDT", "warning", "Warning")), err
    assert list(tmp_path.iterdir()) == [], "nothing may be written"


def test_tables_are_for_people_and_a_trace_on_demand(istanas: Command, tmp_path: Path) -> None:
    code, out, err = istanas(*RETRAIN, "--set", "retrain.layers=1", "--steps", "1", "--trace", "step.json")
    assert (code, err) == (0, "")
    for text in (
        "pictures/s",
        "matrix product, float32, cpu",
        "the whole run",
        "20 epochs x 23",
        "step.json",
    ):
        assert text in out
    assert [path.name for path in tmp_path.iterdir()] == ["step.json"]
    names = {event.get("name") for event in json.loads((tmp_path / "step.json").read_text())["traceEvents"]}
    assert {profiling.DATA_RANGE, profiling.STEP_RANGE, "aten::conv2d"} <= names


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--steps", "0"], 2, "--steps"),
        (["--steps", "few"], 2, "few"),
        (["--job", "sweep"], 2, "sweep"),
        (["--job", "retrain"], 2, "--genotype"),
        (["--job", "search", "--genotype", "ISTA_twostage"], 2, "--genotype"),
        (["--genotype", "ISTA_twostag"], 2, "ISTA_twostage"),
        (["--config", "absent.yaml"], 2, "absent.yaml: cannot be read"),
        (["--set", "search.epoch=3"], 2, "did you mean epochs?"),
        (["--set", "search.max_pictures=5000"], 2, "search.max_pictures: 5000 is above"),
        (["--trace", "absent/step.json"], 2, "absent/step.json"),
        (["--trace", "."], 2, "trace: ."),
        (["--trace", "/dev/null"], 2, "trace: /dev/null"),
    ],
)
def test_bad_input_is_a_one_line_error(
    in_this_process: Command, arguments: list[str], code: int, says: str
) -> None:
    outcome, out, err = in_this_process(*arguments)
    assert (outcome, out) == (code, "")
    assert says in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_a_trace_does_not_replace_a_pipe(in_this_process: Command, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        code, out, err = in_this_process(*RETRAIN, "--trace", name)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert f"trace: {name} cannot be written" in err
    assert (tmp_path / "pipe").is_fifo()


def test_a_trace_follows_a_link_and_keeps_it(in_this_process: Command, tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "link").symlink_to("traces/step.json")
    for _ in range(2):  # to a missing file, and to an existing one
        settings = ("retrain.layers=1", "runtime.workers=2")
        code, out, err = in_this_process(
            *RETRAIN, *(f"--set={each}" for each in settings), "--steps", "1", "--trace", "link"
        )
        assert code == 0, err
        assert "measured and projected for one process; runtime.workers is 2" in out
        assert (tmp_path / "link").is_symlink()
        assert json.loads((tmp_path / "traces" / "step.json").read_text())["traceEvents"]
        assert len(list(tmp_path.rglob("*"))) == 3, "nothing else is left"


def test_a_missing_gpu_is_reported_before_any_step(in_this_process: Command) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU: there is one here")
    code, _, err = in_this_process("--set", "runtime.device=cuda")
    assert code == 2
    assert "runtime.device: cuda requires a GPU" in err


# ---------- FLOPs
def test_flops_of_a_retraining_step_are_those_counted_by_hand() -> None:
    config = load(CONFIGS / "digits_quickstart.yaml", [RETRAIN[-1]])
    dataset = open_dataset(config, ["retrain"])
    genotype = PUBLISHED["ISTA_twostage"]
    work = make_work(config, dataset, Compute(CPU), genotype)
    net = TargetNet(genotype, 8, 4, 10, in_channels=1)
    macs = count_macs(net, (1, 8, 8))
    stem = 9 * 24 * 8 * 8
    # Forward and two gradients, but none of the pictures.
    assert count_flops(lambda: work.train(1, lambda: None)) == 2 * 64 * (3 * macs - stem)


def test_ungrouped_convolutions_and_products_count_as_the_library_says() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.Conv2d(5, 4, 1), nn.Flatten(), nn.Linear(36, 7))
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as library:
        net(images).sum().backward()
    assert count_flops(lambda: net(images).sum().backward()) == library.get_total_flops() > 0


@pytest.mark.parametrize(("of_image", "of_weight"), [(True, False), (False, True), (True, True)])
def test_only_gradients_that_are_asked_for_count(of_image: bool, of_weight: bool) -> None:
    image = torch.ones(2, 6, 5, 5, requires_grad=of_image)
    weight = torch.ones(6, 1, 3, 3, requires_grad=of_weight)
    forward = 2 * 2 * 6 * 25 * 9
    counted = count_flops(lambda: F.conv2d(image, weight, padding=1, groups=6).sum().backward())
    assert counted == forward * (1 + of_image + of_weight)


def test_the_peak_counts_two_operations_a_multiply_add_in_the_best_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock of the test gives one nanosecond per FLOP, or two or three, as on a busy machine."""
    busy = itertools.cycle([3.0, 1.0, 2.0])
    monkeypatch.setattr(profiling, "seconds_of", lambda call, device: next(busy) * count_flops(call) / 1e9)
    assert profiling.peak_flops(CPU, torch.float32) == pytest.approx(1e9)


# ---------- kinds
@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("aten::conv2d", [[8, 4, 6, 6], [7, 4, 1, 1]], "1x1 convolution, forward"),
        ("aten::conv2d", [[8, 1, 6, 6], [7, 1, 3, 3]], "other convolution, forward"),  # grey pictures
        ("aten::conv2d", [[8, 4, 6, 6], [4, 1, 1, 1]], "depthwise convolution, forward"),
        (
            "aten::convolution_backward",
            [[8, 4, 6, 6], [8, 4, 6, 6], [4, 1, 3, 3]],
            "depthwise convolution, backward",
        ),
        ("aten::batch_norm", [[8, 4, 6, 6]], "batch norm"),
        ("aten::cudnn_batch_norm_backward", [], "batch norm"),
        ("aten::max_pool2d_with_indices_backward", [], "pooling"),
        ("aten::adaptive_avg_pool2d", [], "pooling"),
        ("aten::threshold_backward", [], "elementwise and copies"),
        ("aten::relu_", [], "elementwise and copies"),
        ("aten::addmm", [], None),
        ("Optimizer.step#SGD.step", [], "optimiser and clipping"),
        ("autograd::engine::evaluate_function: AddBackward0", [], None),
    ],
)
def test_kind_of_an_operation(name: str, shapes: list[list[int]], kind: str | None) -> None:
    assert kind_of(name, shapes) == kind


def test_counted_calls_are_those_of_the_network() -> None:
    """Every convolution is counted once forward and once backward in a step, whatever operators it calls."""
    config = load(CONFIGS / "digits_quickstart.yaml", [RETRAIN[-1], "retrain.layers=2"])
    work = make_work(config, open_dataset(config, ["retrain"]), Compute(CPU), PUBLISHED["ISTA_onestage"])
    net = TargetNet(PUBLISHED["ISTA_onestage"], 8, 2, 10, in_channels=1)
    ran: list[nn.Module] = []
    for module in net.modules():
        if isinstance(module, DepthwiseConv2d | nn.Conv2d):
            module.register_forward_hook(lambda m, *_: ran.append(m))
    net.forward_with_auxiliary(torch.zeros(2, 1, 8, 8))
    depthwise = sum(isinstance(module, DepthwiseConv2d) for module in ran)
    pointwise = sum(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in ran)
    kinds, _ = time_by_kind(work.train, 2, CPU)
    calls = {kind.kind: kind.calls_per_step for kind in kinds}
    for direction in ("forward", "backward"):
        assert calls[f"depthwise convolution, {direction}"] == depthwise > 0
        assert calls[f"1x1 convolution, {direction}"] == pointwise > 0
        assert calls[f"other convolution, {direction}"] == 1  # the stem
    assert calls["data and augmentation"] == 1


def test_the_time_of_inner_calls_belongs_to_the_outer_operation() -> None:
    """A step of pooling inside the data range counts as data; without the range, as pooling."""
    images = torch.randn(4, 8, 64, 64)

    def make() -> Any:
        while True:
            yield F.max_pool2d(images, 3)

    stream = profiling.as_data(make())

    def train(steps: int, done: Callable[[], None]) -> None:
        for _ in range(steps):
            next(stream)
            done()

    kinds = {kind.kind for kind in time_by_kind(train, 3, CPU)[0]}
    assert kinds == {"data and augmentation", profiling.PYTHON}


# ---------- seconds
def test_every_step_has_its_own_seconds() -> None:
    import time

    def train(steps: int, done: Callable[[], None]) -> None:
        for step in range(steps):
            time.sleep(0.02 * (step + 1))
            done()

    seconds = step_seconds(train, 3, CPU)
    assert len(seconds) == 3
    assert all(s >= 0.02 * (i + 1) for i, s in enumerate(seconds))


def test_batches_are_full_and_never_end() -> None:
    config = load(CONFIGS / "digits_quickstart.yaml", ["search.batch_size=300"])
    dataset = open_dataset(config, ["search"])
    from istanas.data import Augmentation
    from pipeline.training.pictures import Batches
    from pipeline.training.splits import splits_of

    batches = Batches(config, dataset, Compute(CPU), profile_job.Ranks(), 300, Augmentation())
    stream = profile_job._endless(batches, "weights", splits_of(config, dataset, "search").training, 300)
    drawn = [next(stream) for _ in range(5)]
    assert [len(batch.labels) for batch in drawn] == [300] * 5
    assert not torch.equal(drawn[0].labels, drawn[2].labels)  # the next pass is another epoch's
    few = profile_job._endless(batches, "weights", torch.arange(7), 300)
    assert [len(next(few).labels) for _ in range(2)] == [7, 7]


# ---------- on a GPU
@pytest.mark.gpu
def test_a_gpu_has_the_time_of_its_kernels(istanas: Command) -> None:
    if not torch.cuda.is_available():
        pytest.skip("GPU: no CUDA device; run this test where there is one")
    code, out, err = istanas(*RUNS["two-stage"][0], "--set", "runtime.device=cuda", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["device"], result["clock"], result["dtype"]) == ("cuda", "cuda", "bfloat16")
    assert sum(kind["share"] for kind in result["kinds"]) == pytest.approx(1)
    assert result["peak_flops_per_second"] > 1e12
