"""k8s/job.yaml on several hosts of this machine: trains, loses a pod, goes on, ends; what is wrong fails it at once."""

import os
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import naign.cluster.job as rendering
from naign.checkpoint.bucket import download, newest_first
from naign.checkpoint.writer import is_complete
from naign.cluster.render import render_k8s
from naign.config import load, to_dict
from naign.errors import INTERRUPTED
from naign.storage.s3_client import forget_clients
from tests.e2e.runs import same, weights
from tests.hosts.cluster import Cluster, Job, manifest, possible
from tests.hosts.losses import kill_rank, prepared, recover, reported
from tests.hosts.test_manifests import only
from tests.programs import succeeded

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(possible()), reason=possible() or "possible")]


SECRET = "that-nobody-may-read"
ROUNDS = 24
LAST = f"step-{16 * ROUNDS:08d}"


@pytest.fixture
def objects():
    return prepared(2)


def guarded():
    """The manifest with a server that asks for keys."""
    objects = prepared(2)
    deployment = only(objects, "Deployment")
    (store,) = deployment["spec"]["template"]["spec"]["containers"]
    store["env"] += [
        {"name": "AWS_ACCESS_KEY_ID", "value": "somebody"},
        {"name": "AWS_SECRET_ACCESS_KEY", "value": SECRET},
    ]
    store["readinessProbe"]["httpGet"]["path"] = "/healthz"  # who probes has none
    return objects


@pytest.fixture
def cluster(tmp_path, objects):
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)  # pods are other users
    with Cluster(tmp_path / "cluster", objects) as made:
        made.serve("naign-store")
        yield made


def started(cluster):
    """The Job, with its two pods."""
    job = Job(cluster, "naign")
    for index in range(2):
        job.create(index)
    return job


def rounds(job):
    return len(reported(job.pods.get(0)))


def complete(cluster):
    """Whether the bucket holds the last checkpoint, whole, as its own server says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{cluster.pods[0].address}:8333")
        patch.delenv("AWS_ACCESS_KEY_ID", raising=False)
        forget_clients()
        name = next(newest_first("s3://naign/runs/digits"))
        found = download("s3://naign/runs/digits", name, cluster.folder / "found")
    forget_clients()
    return name == LAST and is_complete(found)


def lose_pods(cluster, hosts, losses, rates=None):
    """Run the Job to its end while it loses pods (index, how), each of which is replaced, and no other one."""
    cluster.objects = prepared(hosts, rounds=ROUNDS)
    cluster.secrets = {"naign-s3": {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": SECRET}}
    job = Job(cluster, "naign", rates=rates)
    for index in reversed(range(hosts)):  # host 0 last
        job.create(index)
    for number, (index, kind) in enumerate(losses, 1):
        job.until(lambda: rounds(job) >= 5 * number, 400)  # noqa: B023
        recover(job, index, kind, within=400)
    job.until(lambda: len(job.done) == hosts, 400)
    assert not job.failed and job.failures == sum(kind in ("rank", "launcher") for _, kind in losses)
    assert len(cluster.pods) == 1 + hosts + len(losses)  # the store, the pods, and one for each that was lost
    first = [pod for pod in cluster.pods if pod.name.startswith("naign-0-")][-1]
    assert [line["round"] for line in reported(first)] == [*range(ROUNDS)]
    assert complete(cluster)
    for pod in cluster.pods:
        assert SECRET not in pod.output()


@pytest.mark.timeout(1800)
def test_a_job_loses_pods_and_ends_as_if_nothing_had_happened(cluster, naign):
    lose_pods(cluster, 2, [(1, "rank"), (0, "launcher"), (1, "delete")], rates={1: "100mbit"})
    (cluster.folder / "run.yaml").write_text(cluster.find("ConfigMap", "naign")["data"]["run.yaml"])
    place = cluster.folder / "undisturbed"
    options = (f"--data.path={place}-data", "--data.source=digits", f"--run.path={place}", "--run.remote=")
    config = f"--config={cluster.folder}/run.yaml"
    succeeded(naign("launch", "--processes=2", config, *options))
    found = load_file(cluster.folder / f"found/{LAST}/model.safetensors")
    assert same(found, weights(place))


@pytest.mark.timeout(1800)
def test_a_job_of_four_pods_loses_the_node_of_its_first(cluster):
    lose_pods(cluster, 4, [(0, "node")])


def of_folder64(folder):
    """What `naign render` makes of folder64.yaml with a narrow network, for two pods with ZeRO."""
    config = to_dict(load("folder64"))
    changes = {
        "data.source": "digits",
        "data.workers": 1,
        "model.width": 8,
        "model.depth": 1,
        "model.code": 4,
        "prior.width": 16,
        "prior.depth": 1,
        "prior.images": 1024,
        "prior.passes": 1,
        "prior.batch": 64,
        "match.round": 1024,
        "match.group": 512,
        "train.images": 2048,
        "train.batch": 64,
        "train.threads": 1,
        "train.precision": "fp32",
    }
    for name, value in changes.items():
        section, _, key = name.partition(".")
        config[section][key] = value
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    job = rendering.Job(
        data="s3://naign/digits",
        run="s3://naign/runs/digits",
        nodes="2",
        gpus=0,
        engine="zero2",
        config=folder / "small.yaml",
        endpoint="http://naign-store:8333",
    )
    ours = list(yaml.safe_load_all(render_k8s(job)))
    return ours + [item for item in manifest("job.yaml") if item["metadata"]["name"] == "naign-store"]


def test_a_rendered_job_trains_by_imle_in_groups_under_zero(cluster, tmp_path):
    cluster.objects = of_folder64(tmp_path)
    job = Job(cluster, "digits")
    for index in range(2):
        job.create(index)
    host = job.pods[0]
    job.until(lambda: job.failed or len(job.done) == 2, 400)
    assert not job.failed
    rows = reported(host)
    assert [row["match/used"] > 0 for row in rows if "match/used" in row] == [True, True]
    assert rows[-1]["prior/fitted"] == 1
    assert "DeepSpeed ZeRO-2" in host.output()


def traced(cluster):
    """(epoch, key) of every image of each round, over all pods; a round that was repeated counts once."""
    rounds = {}
    for file in cluster.folder.glob("*/volumes/run/trace/*"):
        for line in file.read_text().splitlines():
            epoch, number, key = line.split()
            rounds.setdefault(int(number), set()).add((epoch, key))
    return rounds


@pytest.mark.timeout(1800)
def test_a_job_goes_on_with_the_hosts_that_are_there_and_takes_in_those_that_come(cluster):
    cluster.objects = prepared(3, rounds=ROUNDS, batch=48)
    config = cluster.find("ConfigMap", "naign")["data"]
    settings = yaml.safe_load(config["run.yaml"])
    settings["match"]["round"] = 1056
    settings["train"]["images"] = ROUNDS * 1056
    settings["data"]["trace"] = "/run/naign/trace"
    config["run.yaml"] = yaml.safe_dump(settings)
    (container,) = cluster.find("Job", "naign")["spec"]["template"]["spec"]["containers"]
    container["command"][2:2] = ["--wait", "30"]
    hosts = next(variable for variable in container["env"] if variable["name"] == "NAIGN_HOSTS")
    hosts["value"] = "2:3"
    job = started(cluster)
    first = job.pods[0]
    job.until(lambda: rounds(job) >= 3, 200)
    assert "2 of 3 hosts are here" in first.output()
    job.create(2)
    job.until(lambda: "another host has come" in first.output(), 60)
    before = rounds(job)
    job.until(lambda: rounds(job) >= before + 4, 200)
    assert "3 of 3 hosts are here" in first.output()
    lost = job.pods.pop(1)
    lost.kill()  # and nobody replaces it
    job.until(lambda: first.output().count("2 of 3 hosts are here") == 2, 60)
    job.until(lambda: job.done == {0, 2}, 400)
    assert [line["round"] for line in reported(first)] == [*range(ROUNDS)]
    seen = traced(cluster)
    assert [len(seen[number]) for number in range(ROUNDS)] == [1056] * ROUNDS
    assert len(set.union(*seen.values())) == ROUNDS * 1056  # no image twice in an epoch


def test_a_rank_that_always_dies_fails_the_job_within_its_limit(cluster):
    cluster.find("Job", "naign")["spec"]["backoffLimitPerIndex"] = 1
    job = started(cluster)
    stays = job.pods[0]

    def failed():
        if 1 in job.pods:
            kill_rank(job.pods[1])
        return bool(job.failed)

    job.until(failed, 200)
    assert "SIGKILL: out of memory?" in job.failed.strip().splitlines()[-1]
    assert job.failures == 2 and len(cluster.pods) == 1 + 2 + 1  # the store, the pods, and pod 1 once more
    deadline = time.monotonic() + 30
    while stays.code is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert stays.code == INTERRUPTED  # by the controller's SIGTERM


def test_a_pod_of_a_deleted_job_is_turned_away(cluster):
    cluster.objects = prepared(2, rounds=2)
    old = Job(cluster, "naign", uid="deleted")
    old.create(1)
    old.until(lambda: "host 1 of 2" in old.pods[1].output(), 60)
    job = Job(cluster, "naign", uid="applied-again")
    job.create(0)
    job.until(lambda: "another start of this job" in job.pods[0].output(), 60)
    assert rounds(job) == 0
    job.create(1)
    job.until(lambda: len(job.done) == 2, 180)
    assert old.pods[1].code is None


def test_what_is_wrong_fails_the_job_at_once(cluster):
    cluster.objects = prepared(2, batch=63)
    config = cluster.find("ConfigMap", "naign")["data"]
    config["run.yaml"] = config["run.yaml"].replace("round: 1024", "round: 1008")
    job = started(cluster)
    job.until(lambda: bool(job.failed), 60)
    assert "cannot be shared evenly by 2 ranks" in job.failed.strip().splitlines()[-1]


@pytest.mark.parametrize("objects", [guarded()])
def test_a_missing_secret_fails_the_job_at_once(cluster):
    job = started(cluster)
    job.until(lambda: bool(job.failed), 60)
    last = job.failed.strip().splitlines()[-1]
    assert "no credentials were found" in last and "set AWS_ACCESS_KEY_ID" in last
