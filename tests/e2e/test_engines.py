"""Every engine trains the same, resumes to the last bit, and takes over from every other one on any number of ranks."""

import json
import shutil

import pytest
import torch
import yaml

from naign.cli import main as cli
from naign.model.naign import NAIGN
from tests.conftest import ROOT, SMALL, ended_as_bad_input, train_command
from tests.e2e.runs import losses, reports, same, weights
from tests.programs import execute, succeeded

pytestmark = pytest.mark.slow

ROUNDS, STEPS = 4, 8
"""Of a run, and a round."""


def engine(name, folder, **changes):
    """A launcher configuration of two ranks. `zero3` cuts every parameter up, which by default only large ones are."""
    config = yaml.safe_load((ROOT / f"launch/{name}.yaml").read_text()) | {"num_processes": 2}
    if name.startswith("zero3"):
        settings = {"stage": 3, "stage3_param_persistence_threshold": 0}
        if name.endswith("offload"):
            settings |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
        file = folder / f"{name}.json"
        deepspeed = {"zero_optimization": settings, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"}
        file.write_text(json.dumps(deepspeed))
        config["deepspeed_config"] = {"deepspeed_config_file": str(file), "zero3_init_flag": False}
        del config["mixed_precision"]
    if "deepspeed_config" in config:
        config["deepspeed_config"] |= changes
    if name == "fsdp":
        config |= {"use_cpu": True, "mixed_precision": "no"}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return str(file)


def launch(file, folder, *options, ranks=2):
    command = train_command(*options)
    at = command.index("--quiet") + 1
    command[at:at] = ["--config_file", file, "--num_processes", str(ranks), "--main_process_port", "0"]
    return execute(command, folder, timeout=480)


def options(digits, run):
    return [
        f"--data.path={digits}",
        f"--run.path={run}",
        *SMALL,
        f"--train.images={256 * ROUNDS}",
        "--train.ema=0.9",
        "--checkpoint.rounds=1",
        "--checkpoint.keep=0",
    ]


@pytest.fixture
def launched(digits, tmp_path):
    """Trains under an engine to the end, and returns what was said."""

    def launched(name, run, *more, ranks=2):
        file = engine(name, tmp_path)
        done = launch(
            file,
            tmp_path,
            *options(digits, run),
            *more,
            ranks=ranks,
        )
        succeeded(done)
        return done.stdout + done.stderr

    return launched


def assert_alike(run, other, rel=1e-4):
    """Every round of both runs has the same losses and matches, but for rounding."""
    for ours, theirs in zip(losses(run, "match/dist"), losses(other, "match/dist"), strict=True):
        assert ours == pytest.approx(theirs, rel=rel)


def from_round(run, other, rounds):
    """`other` begins with the checkpoint of `run` after so many rounds."""
    step = f"checkpoints/step-{rounds * STEPS:08d}"
    shutil.copytree(run / step, other / step)


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory):
    """A run of DDP on two ranks, all checkpoints kept."""
    folder = tmp_path_factory.mktemp("plain")
    succeeded(launch(engine("cpu", folder), folder, *options(digits, "run")))
    return folder / "run"


@pytest.mark.parametrize(
    "name",
    [
        "fsdp",
        "zero1",
        "zero2",
        "zero2_offload",
        "zero3",
        "zero3_offload",
    ],
)
def test_engines_train_as_ddp_does_and_resume_bit_for_bit_and_export(name, plain, launched, tmp_path):
    launched(name, "whole")
    whole = tmp_path / "whole"
    again = tmp_path / "again"
    assert_alike(whole, plain)

    # Its own checkpoint: the same to the last bit.
    from_round(whole, again, 2)
    assert "resuming from" in launched(name, "again")
    assert losses(again, "match/dist") == losses(whole, "match/dist")[2:]
    for kind in ("model", "ema"):
        assert same(weights(again, kind), weights(whole, kind))

    # What it wrote is a model like any other.
    cli.export(str(whole), to=tmp_path / "model")
    model = NAIGN.from_pretrained(tmp_path / "model")
    assert same(model.network.state_dict(), weights(whole, "ema"))
    assert torch.isfinite(model.sample(4)).all()


CODES = [
    "--prior.name=flow",
    "--prior.width=32",
    "--prior.passes=4",
    "--prior.batch=64",
    "--prior.images=512",
    "--prior.classes",
    "--objective.imle=0",
    "--objective.denoising=1",
    "--train.optimizer=adamw",
]


def prior_losses(run):
    """Of f, and in the end of the flow."""
    f = [line["loss/total"] for line in losses(run)]
    return [*f, reports(run)[-1]["prior/loss"]]


def test_a_prior_of_codes_learns_the_same_with_every_engine(launched, tmp_path):
    runs = {}
    for name in ("cpu", "fsdp", "zero2", "zero3"):
        launched(name, name, *CODES)
        runs[name] = prior_losses(tmp_path / name)
    for name in ("fsdp", "zero2", "zero3"):
        assert runs[name] == pytest.approx(runs["cpu"], rel=1e-3)

    # Its own checkpoint, and one rank's: the same to the last bit, and nearly.
    for name, ranks in (("cpu", 2), ("single", 1)):
        from_round(tmp_path / "cpu", tmp_path / f"again-{name}", 1)
        launched(name, f"again-{name}", *CODES, ranks=ranks)
    assert prior_losses(tmp_path / "again-cpu") == runs["cpu"][1:]
    assert prior_losses(tmp_path / "again-single") == pytest.approx(runs["cpu"][1:], rel=2e-2)
    assert same(weights(tmp_path / "again-cpu"), weights(tmp_path / "cpu"))


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("fsdp", 2),
        ("zero2", 2),
        ("zero3", 2),
        ("zero1", 4),
        ("single", 1),
    ],
)
def test_another_engine_goes_on_with_the_optimizers_state(name, ranks, plain, launched, tmp_path):
    from_round(plain, tmp_path / "run", 2)
    launched(name, "run", ranks=ranks)
    # The images of a step are the same on every world size.
    for ours, theirs in zip(losses(tmp_path / "run"), losses(plain)[2:], strict=True):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-4)


@pytest.mark.parametrize("name", ["cpu", "fsdp", "zero2"])
def test_micro_batches_and_bfloat16(name, plain, launched, tmp_path):
    said = launched(name, "parts", "--train.accumulate=2")
    assert_alike(tmp_path / "parts", plain)
    assert "8 images x 2 micro-batches x 2 ranks" in said

    launched(name, "half", "--train.precision=bf16")
    ours = losses(tmp_path / "half")[-1]["loss/total"]
    theirs = losses(plain)[-1]["loss/total"]
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.02)
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "half").values())


def test_recomputed_networks_train_alike(launched, tmp_path):
    launched("cpu", "deep", "--model.depth=1")
    launched("cpu", "other", "--model.depth=1", "--train.recompute")
    assert_alike(tmp_path / "other", tmp_path / "deep", rel=1e-3)


def test_what_an_engine_cannot_do_is_refused_at_the_start(digits, tmp_path):
    """All of it is in tests/training/test_engines.py."""
    done = launch(engine("zero2", tmp_path, gradient_clipping=5.0), tmp_path, *options(digits, "run"), ranks=1)
    assert done.returncode != 0 and "gradient_clipping: 5.0, but train.clip" in done.stderr, done.stderr
    assert ended_as_bad_input(done.stderr) and not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with g++")
@pytest.mark.skipif(torch.__version__ < "2.12.0a0", reason="train.compile needs torch 2.12")
def test_a_compiled_network_trains_alike(plain, launched, tmp_path):
    launched("cpu", "run", "--train.compile")
    assert_alike(tmp_path / "run", plain)
    assert weights(tmp_path / "run").keys() == weights(plain).keys()


def test_ranks_of_fsdp_agree_after_pictures_and_a_checkpoint(digits, tmp_path):
    """A network without encode and decode keeps its gathered weights after a forward, and rank 0 alone writes them."""
    options = [
        *SMALL,
        f"--data.path={digits}",
        "--run.path=run",
        "--model.name=spatial",
        "--model.blend",
        "--train.images=768",
        "--report.pictures=1",
        "--checkpoint.rounds=1",
        "--train.timeout=20",
    ]
    succeeded(launch(engine("fsdp", tmp_path), tmp_path, *options))
