"""Every engine trains the same, resumes to the last bit, and takes over from every other one on any number of ranks."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from naign.checkpoint.writer import newest_checkpoint
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
        file.write_text(
            json.dumps({"zero_optimization": settings, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"})
        )
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
    return execute(command, folder)


def options(digits, run):
    return [
        *(f"--data.path={digits}", f"--run.path={run}", *SMALL, f"--train.images={256 * ROUNDS}", "--train.ema=0.9"),
        *("--checkpoint.rounds=1", "--checkpoint.keep=0"),
    ]


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


@pytest.mark.parametrize("name", ["fsdp", "zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_engines_train_as_ddp_does_and_resume_bit_for_bit_and_export(name, plain, digits, tmp_path):
    file = engine(name, tmp_path)
    succeeded(launch(file, tmp_path, *options(digits, "whole")))
    for ours, theirs in zip(losses(tmp_path / "whole", "match/dist"), losses(plain, "match/dist"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)

    # Its own checkpoint: the same to the last bit.
    from_round(tmp_path / "whole", tmp_path / "again", 2)
    again = succeeded(launch(file, tmp_path, *options(digits, "again")))
    assert "resuming from" in again.stdout + again.stderr
    assert losses(tmp_path / "again", "match/dist") == losses(tmp_path / "whole", "match/dist")[2:]
    for kind in ("model", "ema"):
        assert same(weights(tmp_path / "again", kind), weights(tmp_path / "whole", kind))

    # What it wrote is a model like any other.
    cli.export(str(tmp_path / "whole"), to=tmp_path / "model")
    model = NAIGN.from_pretrained(tmp_path / "model")
    assert same(model.network.state_dict(), weights(tmp_path / "whole", "ema"))
    assert torch.isfinite(model.sample(4)).all()


CODES = ["--prior.name=flow", "--prior.width=32", "--prior.passes=4", "--prior.batch=64"]
CODES += [
    "--prior.images=512",
    "--prior.student=256",
    "--prior.classes",
    "--objective.imle=0",
    "--objective.denoising=1",
]


def prior_losses(run):
    """Of f, and in the end of the flow's student."""
    f = [line["loss/total"] for line in losses(run)]
    return [*f, reports(run)[-1]["prior/student"]]


def test_a_prior_of_codes_learns_the_same_with_every_engine(digits, tmp_path):
    runs = {}
    for name in ("cpu", "fsdp", "zero2", "zero3"):
        succeeded(launch(engine(name, tmp_path), tmp_path, *options(digits, name), *CODES))
        runs[name] = prior_losses(tmp_path / name)
    for name in ("fsdp", "zero2", "zero3"):
        assert runs[name] == pytest.approx(runs["cpu"], rel=1e-3)

    # Its own checkpoint, and one rank's: the same to the last bit, and nearly.
    for name, ranks in (("cpu", 2), ("single", 1)):
        from_round(tmp_path / "cpu", tmp_path / f"again-{name}", 1)
        succeeded(launch(engine(name, tmp_path), tmp_path, *options(digits, f"again-{name}"), *CODES, ranks=ranks))
        found = prior_losses(tmp_path / f"again-{name}")
        assert found == (runs["cpu"][1:] if ranks == 2 else pytest.approx(runs["cpu"][1:], rel=2e-2))
    again, whole = (newest_checkpoint(tmp_path / run / "checkpoints") for run in ("again-cpu", "cpu"))
    assert again and whole and again.name == whole.name
    assert same(load_file(again / "model.safetensors"), load_file(whole / "model.safetensors"))


@pytest.mark.parametrize(("name", "ranks"), [("fsdp", 2), ("zero2", 2), ("zero3", 2), ("zero1", 4), ("single", 1)])
def test_another_engine_goes_on_with_the_optimizers_state(name, ranks, plain, digits, tmp_path):
    from_round(plain, tmp_path / "run", 2)
    succeeded(launch(engine(name, tmp_path), tmp_path, *options(digits, "run"), ranks=ranks))
    found, expected = losses(tmp_path / "run", "match/dist"), losses(plain, "match/dist")[2:]
    for ours, theirs in zip(found, expected, strict=True):  # the images of a step are the same on every world size
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-4)


@pytest.mark.parametrize("name", ["cpu", "fsdp", "zero2"])
def test_micro_batches_and_bfloat16(name, plain, digits, tmp_path):
    file = engine(name, tmp_path)
    done = succeeded(launch(file, tmp_path, *options(digits, "parts"), "--train.accumulate=2"))
    for ours, theirs in zip(losses(tmp_path / "parts", "match/dist"), losses(plain, "match/dist"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert "8 images x 2 micro-batches x 2 ranks" in done.stdout + done.stderr

    succeeded(launch(file, tmp_path, *options(digits, "half"), "--train.precision=bf16"))
    ours, theirs = (
        losses(tmp_path / "half", "match/dist")[-1]["loss/total"],
        losses(plain, "match/dist")[-1]["loss/total"],
    )
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.02)
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "half").values())


def test_recomputed_networks_train_alike(digits, tmp_path):
    file = engine("cpu", tmp_path)
    more = ["--train.recompute", "--model.depth=1"]
    for run, extra in (("deep", ["--model.depth=1"]), ("other", more)):
        succeeded(launch(file, tmp_path, *options(digits, run), *extra))
    for ours, theirs in zip(
        losses(tmp_path / "other", "match/dist"), losses(tmp_path / "deep", "match/dist"), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_what_an_engine_cannot_do_is_refused_at_the_start(digits, tmp_path):
    """All of it is in tests/training/test_engines.py."""
    done = launch(engine("zero2", tmp_path, gradient_clipping=5.0), tmp_path, *options(digits, "run"), ranks=1)
    assert done.returncode != 0 and "gradient_clipping: 5.0, but train.clip" in done.stderr, done.stderr
    assert ended_as_bad_input(done.stderr) and not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with g++")
def test_a_compiled_network_trains_alike(plain, digits, tmp_path):
    file = engine("cpu", tmp_path)
    succeeded(launch(file, tmp_path, *options(digits, "run"), "--train.compile"))
    for ours, theirs in zip(losses(tmp_path / "run", "match/dist"), losses(plain, "match/dist"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert weights(tmp_path / "run").keys() == weights(plain).keys()


def test_ranks_of_fsdp_agree_after_pictures_and_a_checkpoint(digits, tmp_path):
    """A network without encode and decode keeps its gathered weights after a forward, and rank 0 alone writes them."""
    small = [*SMALL, f"--data.path={digits}", "--run.path=run", "--model.name=spatial", "--model.blend"]
    checked = ["--train.images=768", "--report.pictures=1", "--checkpoint.rounds=1", "--train.timeout=20"]
    succeeded(launch(engine("fsdp", tmp_path), tmp_path, *small, *checked))
