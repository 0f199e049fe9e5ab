"""The programs with their data in a bucket: packing, training that is killed and goes on, faults, mistakes."""

import json
import signal
from collections import Counter

import pytest

from naign.data.format.manifest import Manifest
from naign.errors import PEER_LOST
from naign.storage.store import open_store
from tests.conftest import SMALL, ended_as_bad_input, start
from tests.e2e.runs import losses, reports, wait_for_rounds
from tests.programs import ends, refused, succeeded
from tests.proxy import Faults

pytestmark = pytest.mark.slow

IMAGES = 1438  # training images of the digits


def listed(folder):
    """(epoch, round, key) in the trace files of all ranks."""
    found = Counter()
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            epoch, round, key = line.split()
            found[int(epoch), int(round), key] += 1
    return found


def pack(naign, to, shards=4):
    """Pack the digits; what was said."""
    done = succeeded(naign(f"pack digits --to {to} --shards {shards}"))
    return done.stdout


def test_a_killed_run_goes_on_with_two_ranks_and_sees_each_image_once(naign, train, bucket, tmp_path):
    data = f"{bucket}/deep/digits"
    assert "1438 train in 5 shards" in pack(naign, data, 5)
    assert "already there" in pack(naign, data, 5)
    checked = succeeded(naign(f"verify {data}"))
    assert "sound" in checked.stdout

    # 12 rounds of 256 are two epochs of 1,438 and a bit.
    options = [
        f"--data.path={data}",
        *SMALL,
        "--run.path=run",
        "--train.images=3072",
        "--checkpoint.rounds=2",
        "--data.trace=trace",
    ]
    job = start(tmp_path, "--data.workers=2", *options)
    wait_for_rounds(job, tmp_path / "run", 5)
    job.kill()
    ends(job, -signal.SIGKILL)
    before = listed(tmp_path / "trace")
    again = succeeded(train(*options, ranks=2))
    assert "resuming from" in again.stdout + again.stderr

    # A round that the kill undid is listed again, alike; nothing else is.
    seen = listed(tmp_path / "trace")
    assert set(before) < set(seen)
    assert max(seen.values()) == 2
    rounds = Counter()
    times = Counter()  # of a key in an epoch
    for epoch, round, key in seen:
        rounds[round] += 1
        times[epoch, key] += 1
    assert rounds == dict.fromkeys(range(12), 256)
    assert set(times.values()) == {1}
    epochs = Counter(epoch for epoch, _ in times)
    assert epochs[0] == epochs[1] == IMAGES
    found = losses(tmp_path / "run")
    assert found[-1]["loss/total"] < found[0]["loss/total"]
    trainer = json.loads((max((tmp_path / "run/checkpoints").iterdir()) / "trainer.json").read_text())
    assert trainer["round"] == 12
    assert trainer["epoch"] == pytest.approx(12 * 256 / IMAGES)


def test_a_run_through_faults_gives_the_same_losses(naign, train, digits, s3, bucket, proxy, tmp_path):
    options = ["--train.images=5120", *SMALL]  # of half as many, one run in twenty would meet no flip
    succeeded(train("--run.path=plain", f"--data.path={digits}", *options))
    pack(naign, f"{bucket}/digits")
    # Flips are rare: with resets a page takes some three answers, and four reads of it that are wrong end a run.
    proxy.faults = Faults(reset_every=(50_000, 200_000), refuse=0.1, errors=0.2, flip=0.03)
    succeeded(train("--run.path=faulty", f"--data.path={bucket}/digits", *options))
    assert losses(tmp_path / "plain") == losses(tmp_path / "faulty")
    assert {"reset", "refuse", "error", "flip"} <= proxy.counts.keys()
    last = reports(tmp_path / "faulty")[-1]
    assert {"data/epoch", "data/megabytes", "data/retries", "data/reread_megabytes", "data/skipped"} <= set(last)


def test_a_shard_that_stays_wrong_stops_every_rank_with_its_name(train, naign, bucket, proxy, tmp_path):
    data = f"{bucket}/digits"
    pack(naign, data)
    proxy.faults = Faults(flip_always="train-00002.tar")
    done = train(f"--data.path={data}", *SMALL, "--train.images=2560", "--run.path=run", ranks=2)
    assert done.returncode != 0
    assert ended_as_bad_input(done.stderr)
    assert f"{data}/train-00002.tar: the SHA-256 of what follows byte" in done.stderr


def test_a_store_that_is_emptied_under_a_run_is_a_loss(naign, bucket, tmp_path):
    data = f"{bucket}/digits"
    pack(naign, data)
    job = start(tmp_path, f"--data.path={data}", "--run.path=run", *SMALL, "--train.images=307200")
    wait_for_rounds(job, tmp_path / "run", 3)
    store = open_store(data)
    for name in store.list():
        store.delete(name)
    last = ends(job, PEER_LOST).splitlines()[-1]
    assert "no such object" in last
    assert "all ranks start again" in last


@pytest.mark.parametrize(
    ("changed", "path", "part"),
    [
        ({}, "s3://no-such-bucket-here/x", "there is no bucket no-such-bucket-here"),
        ({"AWS_SECRET_ACCESS_KEY": "not-the-secret-at-all"}, "{bucket}/digits", "check the credentials"),
        ({}, "{bucket}/nothing", "no data set here"),
    ],
)
def test_mistakes_with_buckets_end_with_code_2(
    changed,
    path,
    part,
    train,
    naign,
    bucket,
    tmp_path,
    monkeypatch,
):
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    path = path.format(bucket=bucket)
    for done in (train(f"--data.path={path}", "--run.path=run", *SMALL), naign(f"verify {path}")):
        refused(done, part)
        assert "not-the-secret" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_indexing_tars_of_others(naign, train, bucket, tmp_path):
    pack(naign, "packed")
    store = open_store(bucket)
    for file in sorted((tmp_path / "packed").glob("*.tar")):
        store.put(file.name.replace("test", "val"), file.read_bytes())
    done = succeeded(naign(f"index {bucket} --name mine"))
    assert "mine 1x8x8, 1438 train in 4 shards, 359 test in 4 shards" in done.stdout
    assert Manifest.load(bucket).split("test").shards[0].name == "val-00000.tar"
    succeeded(naign(f"verify {bucket}"))
    refused(naign(f"index {bucket}"))
    succeeded(train(f"--data.path={bucket}", *SMALL, "--train.images=512", "--run.path=run"))
