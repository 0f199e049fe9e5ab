"""k8s/job.yaml on several hosts of this machine: trains, loses a pod, goes on, ends; what is wrong fails it at once."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hosts.cluster import Cluster, Job, manifest, possible

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(possible()), reason=possible() or "possible")]


SECRET = "that-nobody-may-read"


def prepared(hosts: int, **train: Any) -> list[dict[str, Any]]:
    """The manifest for so many pods, with a smaller budget."""
    objects = manifest("job.yaml")
    for item in objects:
        if item["kind"] == "ConfigMap" and "run.yaml" in item["data"]:
            config = yaml.safe_load(item["data"]["run.yaml"])
            config["train"] |= {"images": 24 * 1024, "threads": 1, **train}
            config["checkpoint"] = {"rounds": 5}
            item["data"]["run.yaml"] = yaml.safe_dump(config)
        if item["kind"] == "Job":
            item["spec"] |= {"completions": hosts, "parallelism": hosts}
            for variable in item["spec"]["template"]["spec"]["containers"][0]["env"]:
                if variable["name"] == "NAIGN_HOSTS":
                    variable["value"] = str(hosts)
    return objects


@pytest.fixture
def objects() -> list[dict[str, Any]]:
    return prepared(2)


def guarded() -> list[dict[str, Any]]:
    """The manifest with a server that asks for keys."""
    objects = prepared(2)
    store = next(item for item in objects if item["kind"] == "Deployment")["spec"]["template"]["spec"]["containers"][0]
    keys = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": SECRET}
    store["env"] += [{"name": name, "value": value} for name, value in keys.items()]
    store["readinessProbe"]["httpGet"]["path"] = "/healthz"  # who probes has none
    return objects


@pytest.fixture
def cluster(tmp_path: Path, objects: list[dict[str, Any]]) -> Iterator[Cluster]:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)  # pods are other users
    with Cluster(tmp_path / "cluster", objects) as made:
        made.serve("naign-store")
        yield made
        if "NAIGN_HOSTS_LOG" in os.environ:
            with Path(os.environ["NAIGN_HOSTS_LOG"]).open("a") as log:
                log.write("\n".join([os.environ.get("PYTEST_CURRENT_TEST", ""), *made.events, ""]) + "\n")


def started(cluster: Cluster) -> Job:
    """The Job, with its two pods."""
    job = Job(cluster, "naign")
    for index in range(2):
        job.create(index)
    return job


def rounds(job: Job, index: int = 0) -> int:
    """That host 0 has reported, by its own files."""
    pod = job.pods.get(index)
    if pod is None:
        return 0
    metrics = pod.log.parent / "volumes/run/digits/metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def complete(cluster: Cluster) -> bool:
    """Whether the bucket holds the last checkpoint, whole, as its own server says."""
    from pipeline.checkpoint.bucket import download, newest_first
    from pipeline.checkpoint.writer import is_complete
    from pipeline.storage.store import open_store

    address = next(pod.address for pod in cluster.pods if pod.name == "naign-store")
    before = {name: os.environ.pop(name, None) for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID")}
    from pipeline.storage.s3_client import forget_clients

    os.environ["AWS_ENDPOINT_URL"] = f"http://{address}:8333"
    forget_clients()
    try:
        assert open_store("s3://naign/digits").list()
        name = next(newest_first("s3://naign/runs/digits"))
        found = download("s3://naign/runs/digits", name, cluster.folder / "found")
        return name == "step-00000384" and is_complete(found)
    finally:
        del os.environ["AWS_ENDPOINT_URL"]
        os.environ |= {name: value for name, value in before.items() if value is not None}
        forget_clients()


@pytest.mark.parametrize(("hosts", "lost", "rate"), [(2, 1, "100mbit"), (4, 0, "")])
def test_a_job_trains_loses_a_pod_goes_on_and_ends(hosts, lost, rate, cluster):
    cluster.objects = prepared(hosts)
    cluster.secrets = {"naign-s3": {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": SECRET}}
    job = Job(cluster, "naign", rates={1: rate} if rate else None)
    for index in reversed(range(hosts)):  # host 0 last
        job.create(index)
    job.until(lambda: rounds(job) >= 8, 120)
    cluster.tell(f"{rounds(job)} rounds; {job.pods[lost].name} is killed")
    killed = time.monotonic()
    job.pods[lost].kill()
    job.until(lambda: rounds(job) < 8, 30)
    job.until(lambda: rounds(job) > 8, 90)
    cluster.tell(f"goes on, {time.monotonic() - killed:.1f} s after the kill")
    assert time.monotonic() - killed < 60
    job.until(lambda: len(job.done) == hosts, 180)
    assert not job.failed and job.failures == 1  # the one that was killed; its peers do not count
    assert complete(cluster)
    assert SECRET not in "".join(pod.said() for pod in cluster.pods)


def test_a_pod_that_is_asked_to_go_costs_nothing(cluster):
    job = started(cluster)
    job.until(lambda: rounds(job) >= 4, 120)
    job.pods[1].kill(signal.SIGTERM)
    job.until(lambda: len(job.done) == 2, 180)
    assert not job.failed and job.failures == 0 and complete(cluster)
    assert any("ended with 75" in event for event in cluster.events)


def test_a_pod_of_a_deleted_job_is_turned_away(cluster):
    old = Job(cluster, "naign", uid="deleted")
    old.create(1)
    time.sleep(8)
    job = Job(cluster, "naign", uid="applied-again")
    job.create(0)
    job.until(lambda: "another start of this job" in job.pods[0].said(), 60)
    assert rounds(job) == 0
    job.create(1)
    job.until(lambda: len(job.done) == 2, 180)
    assert complete(cluster) and old.pods[1].code is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": 63}, "cannot be shared evenly by 2 ranks"),
        ({"images": -1}, "train.images is -1"),
    ],
)
def test_what_is_wrong_fails_the_job_at_once(change, said, cluster):
    cluster.objects = prepared(2, **change)
    if "batch" in change:
        config = cluster.find("ConfigMap", "naign")["data"]
        config["run.yaml"] = config["run.yaml"].replace("round: 1024", "round: 1008")
    job = started(cluster)
    job.until(lambda: bool(job.failed), 60)
    assert said in job.failed.strip().splitlines()[-1]


def test_a_bucket_that_does_not_exist_fails_the_job_at_once(cluster):
    config = cluster.find("ConfigMap", "naign")["data"]
    config["run.yaml"] = config["run.yaml"].replace("s3://naign/", "s3://missing/")
    job = started(cluster)
    job.until(lambda: bool(job.failed), 60)
    assert "there is no bucket" in job.failed.strip().splitlines()[-1]


@pytest.mark.parametrize("objects", [guarded()])
def test_a_missing_secret_fails_the_job_at_once(cluster):
    job = started(cluster)
    job.until(lambda: bool(job.failed), 60)
    last = job.failed.strip().splitlines()[-1]
    assert "no credentials were found" in last and "set AWS_ACCESS_KEY_ID" in last


def test_a_bucket_out_of_reach_fails_the_job(cluster):
    cluster.find("ConfigMap", "naign-store")["data"]["AWS_ENDPOINT_URL"] = "http://naign-store:8444"
    cluster.find("Job", "naign")["spec"]["template"]["spec"]["containers"][0]["command"].append("--reach=3")
    job = started(cluster)
    job.until(lambda: bool(job.failed), 240)
    last = job.failed.strip().splitlines()[-1]
    assert "cannot be reached" in last and "http://naign-store:8444" in last
