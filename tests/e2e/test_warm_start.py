"""A run that begins from the weights of another one."""

import pytest
import torch

from naign.checkpoint.bucket import upload
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, PointConfig
from tests.checkpoint.written import write_checkpoint
from tests.e2e.runs import losses, weights
from tests.programs import refused, succeeded

pytestmark = pytest.mark.slow

CODES = ["--prior.name=flow", "--prior.width=32", "--prior.passes=2", "--prior.batch=64", "--prior.images=512"]


def test_it_begins_where_the_other_ended_and_need_not_have_it_to_resume(train, small, tmp_path):
    options = [*small, *CODES]
    succeeded(train("--run.path=one", *options, "--train.images=4096"))
    last = losses(tmp_path / "one")[7]["loss/reconstruction"]
    options += ["--run.path=two", "--model.init=one", "--train.images=1024", "--train.lr=1e-5", "--prior.steps=3"]
    succeeded(train(*options))
    assert losses(tmp_path / "two")[0]["loss/reconstruction"] < 1.1 * last

    (tmp_path / "one").rename(tmp_path / "gone")
    begun = NAIGN.from_pretrained(tmp_path / "two")
    assert begun.metadata["model"]["init"] == ""
    assert begun.prior.config.steps == 3
    succeeded(train(*options))  # nothing is left to do, and the other run is not looked for

    # Another size of code: what fits is taken.
    options += [
        "--run.path=three",
        "--model.init=gone",
        "--model.code=9",
        "--train.images=256",
        "--train.lr=1e-9",
        "--train.lr_end=1e-9",
        "--train.warmup=0",
        "--prior.lr=1e-9",
    ]
    done = succeeded(train(*options))
    assert "9 of 12 weights are from" in done.stderr
    old = weights(tmp_path / "gone")["encoder.0.weight"]
    new = weights(tmp_path / "three")["encoder.0.weight"]
    torch.testing.assert_close(new, old, atol=1e-6, rtol=0)


def test_what_it_cannot_begin_from_is_refused_before_anything_is_written(train, save_untrained, small, tmp_path):
    torch.save({"encoder.0.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    save_untrained(tmp_path / "mlp", data=None, shape=(1, 8, 8), config=PointConfig(width=8))
    for place, said in (
        ("mlp", "model.name=mlp"),
        ("nothing", "nothing"),
        ("model.safetensors", "no readable safetensors file"),
    ):
        done = train(*small, f"--model.init={place}", "--run.path=run")
        refused(done, said)
        assert not (tmp_path / "run").exists()


def test_one_rank_fetches_one_file_of_a_run_in_a_bucket(train, save_untrained, small, bucket, proxy, tmp_path):
    config = ConvConfig(width=8, code=16)
    made = save_untrained(tmp_path / "model", data=None, shape=(1, 8, 8), config=config)
    model = NAIGN.from_pretrained(made)
    checkpoint = tmp_path / "other/checkpoints/step-00000010"
    write_checkpoint(checkpoint, model.save_pretrained)
    upload(checkpoint, bucket, [file.name for file in checkpoint.iterdir()])
    proxy.requests.clear()
    options = [*small, "--train.images=256", "--train.lr=1e-9", "--train.lr_end=1e-9"]
    done = succeeded(train(*options, f"--model.init={bucket}", "--run.path=run", ranks=2))
    assert "weights are from s3://" in done.stderr
    files = [path.rpartition("/")[2] for method, path in proxy.requests if method == "GET" and "/step-" in path]
    assert files == ["manifest.json", "model.safetensors"], proxy.requests
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, model.network.state_dict()[name], atol=1e-5, rtol=0)
