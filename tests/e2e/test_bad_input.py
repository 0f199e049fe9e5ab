"""A user's mistake: exit code 2 within seconds, on every rank, with what to do and no traceback; nothing is written."""

import io
import shutil

import pytest
from PIL import Image

from tests.conftest import ROOT, SMALL, direct_command, ended_as_bad_input
from tests.data.numbered import rewrite
from tests.e2e.runs import column, reports
from tests.programs import execute, refused, succeeded

pytestmark = pytest.mark.slow


def run_alone(folder, *options):
    """Without the launcher, which turns any exit code of its ranks into 1."""
    return execute(direct_command("--run.path=run", *SMALL, *options), folder, timeout=60)


def broken(digits, folder, damage):
    """A copy of the digits with one thing wrong in one shard: written so, with an index that agrees, or truncated."""
    data = str(shutil.copytree(digits, folder / "data"))
    shard = folder / "data/train-00001.tar"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:100_000])
        return data
    content = b"no picture"
    if damage == "shape":
        picture = io.BytesIO()
        Image.new("L", (9, 9)).save(picture, "PNG")
        content = picture.getvalue()

    def change(members):
        label, (name, _), *others = members
        assert name.endswith(".png")
        yield from (label, (name, content), *others)

    rewrite(data, shard.name, change)
    return data


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        ("truncated", ["index.json says"]),
        ("shape", ["9", "digit-"]),
        ("undecodable", ["digit-"]),
    ],
)
def test_damaged_data_names_the_shard(damage, parts, digits, tmp_path):
    data = broken(digits, tmp_path, damage)
    refused(run_alone(tmp_path, f"--data.path={data}", "--match.round=1408"), "train-00001.tar", *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--train.lrr=1"], ["--train.lr"]),
        (["--data.path=nowhere"], ["nowhere", "naign pack"]),
        (["--data.path=noindex"], ["noindex", "index.json", "naign pack"]),
        (["--data.path={digits}", "--data.split=validation"], ["validation", "train", "test"]),
        (["--data.path={digits}", "--model.name=conv", "--run.path=file/run"], ["file/run"]),
        (["--data.path={points}"], ["model.name=mlp"]),
        (["--data.path={digits}", "--report.trackers=[jsonl, wandbb]"], ["did you mean wandb?"]),
        (["--config", "{root}/configs/digits.yaml", "--data.path=data/digitz"], ["naign pack digits --to data/digitz"]),
    ],
)
def test_a_mistake_is_refused_and_leaves_nothing_behind(options, parts, digits, points, tmp_path):
    (tmp_path / "noindex").mkdir()
    (tmp_path / "noindex/train-00000.tar").touch()
    (tmp_path / "file").touch()
    given = [option.format(digits=digits, points=points, root=ROOT) for option in options]
    refused(run_alone(tmp_path, *given), *parts)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "data").exists()


def test_a_round_that_ranks_cannot_share_is_refused_on_every_rank(train, small, tmp_path):
    options = ["--match.round=255", "--train.batch=51", "--run.path=run"]
    done = train(*small, *options, ranks=2)
    assert done.returncode != 0
    assert "use 1, 3, 17, 51 ranks, or another train.batch" in done.stderr
    # The launcher says what its first rank to leave ended with, and returns 1 itself.
    assert ended_as_bad_input(done.stderr)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_configuration_is_not_mixed_with(digits, tmp_path):
    options = [f"--data.path={digits}", "--train.images=512"]
    succeeded(run_alone(tmp_path, *options))
    lines = reports(tmp_path / "run")
    assert column(tmp_path / "run", "images_seen") == [256, 512]
    assert {"loss/total", "loss/imle", "match/distance", "train/lr", "share/match"} <= lines[0].keys()

    def held():
        return {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    before = held()
    refused(run_alone(tmp_path, *options, "--train.lr=0.5"), "train.lr: 0.006 there, 0.5 now", "--run.path")
    assert held() == before
