"""A run that begins from the weights of another one."""

import pytest
import torch
from safetensors.torch import load_file

from naign.checkpoint.bucket import upload
from naign.checkpoint.writer import newest_checkpoint
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, build_network
from tests.checkpoint.written import write_checkpoint
from tests.conftest import SMALL
from tests.e2e.runs import losses
from tests.programs import succeeded

pytestmark = pytest.mark.slow

CODES = ["--prior.name=flow", "--prior.width=32", "--prior.passes=2", "--prior.batch=64", "--prior.images=512"]


def test_it_begins_where_the_other_ended_and_need_not_have_it_to_resume(train, digits, tmp_path):
    options = [f"--data.path={digits}", *SMALL, *CODES]
    succeeded(train("--run.path=one", *options, "--train.images=4096"))
    last = losses(tmp_path / "one")[7]
    options += ["--run.path=two", "--model.init=one", "--train.images=1024", "--train.lr=1e-5", "--prior.steps=3"]
    succeeded(train(*options))
    begin = losses(tmp_path / "two")[0]
    assert begin["loss/reconstruction"] < 1.1 * last["loss/reconstruction"]

    (tmp_path / "one").rename(tmp_path / "gone")
    newest = newest_checkpoint(tmp_path / "two/checkpoints")
    assert newest and NAIGN.from_pretrained(newest).metadata["model"]["init"] == ""
    assert NAIGN.from_pretrained(newest).prior.config.steps == 3
    succeeded(train(*options))  # nothing is left to do, and the other run is not looked for

    # Another size of code: what fits is taken.
    options[-4:] = ["--model.init=gone", "--run.path=three", "--train.images=256", "--model.code=9", "--train.lr=1e-9"]
    options += ["--train.lr_end=1e-9", "--train.warmup=0", "--prior.lr=1e-9"]
    done = succeeded(train(*options))
    assert "not decoder.1.weight" in done.stderr
    old, new = (newest_checkpoint(tmp_path / name / "checkpoints") for name in ("gone", "three"))
    assert old and new
    old, new = load_file(old / "model.safetensors"), load_file(new / "model.safetensors")
    torch.testing.assert_close(new["encoder.0.weight"], old["encoder.0.weight"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("given", ["mlp", "nothing", "a pickle"])
def test_what_it_cannot_begin_from_is_refused_before_anything_is_written(train, digits, tmp_path, given):
    if given == "a pickle":
        torch.save({"encoder.0.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    if given == "mlp":
        points = [option for option in SMALL if not option.startswith("--model.code")]
        options = ["--model.name=mlp", "--latents.name=gaussian"]
        succeeded(train(f"--data.path={digits}", *points, *options, "--run.path=mlp", "--train.images=256"))
    place = "model.safetensors" if given == "a pickle" else given
    done = train(f"--data.path={digits}", *SMALL, f"--model.init={place}", "--run.path=run")
    assert done.returncode == 2
    said = {"mlp": "model.name=mlp", "nothing": "nothing", "a pickle": "no readable safetensors file"}[given]
    assert said in done.stderr and not (tmp_path / "run").exists()


def test_one_rank_fetches_one_file_of_a_run_in_a_bucket(train, digits, bucket, proxy, tmp_path):
    metadata = {
        "model": {"name": "conv", "width": 8, "code": 16},
        "shape": [1, 8, 8],
        "latents": {"name": "gaussian"},
        "prior": {"name": "none"},
    }
    model = NAIGN(build_network(ConvConfig(width=8, code=16), (1, 8, 8)), metadata)
    checkpoint = tmp_path / "other/checkpoints/step-00000010"
    write_checkpoint(checkpoint, model.save_pretrained)
    upload(checkpoint, bucket, [file.name for file in checkpoint.iterdir()])
    proxy.requests.clear()
    options = [f"--data.path={digits}", *SMALL, "--train.images=256", "--train.lr=1e-9", "--train.lr_end=1e-9"]
    done = succeeded(train(*options, f"--model.init={bucket}", "--run.path=run", ranks=2))
    assert "weights are from s3://" in done.stderr
    files = [path.rpartition("/")[2] for method, path in proxy.requests if method == "GET" and "/step-" in path]
    assert files == ["manifest.json", "model.safetensors"], proxy.requests
    newest = newest_checkpoint(tmp_path / "run/checkpoints")
    assert newest
    for name, value in load_file(newest / "model.safetensors").items():
        torch.testing.assert_close(value, model.network.state_dict()[name], atol=1e-5, rtol=0)
