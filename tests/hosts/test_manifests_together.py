"""The manifests agree with each other: one run, one store, one small node for all of them, one after the other."""

import re
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.hosts.manifest_checks import templates
from tests.hosts.test_manifests import FILES, OVERLAYS, build, native, read


def amount(text: str) -> float:
    """CPUs or bytes, as Kubernetes writes them."""
    number, unit = re.fullmatch(r"(\d+)(m|Mi|Gi|)", text).groups()
    return int(number) * {"m": 1e-3, "": 1, "Mi": 2**20, "Gi": 2**30}[unit]


def requested(objects: list[dict[str, Any]], kinds: tuple[str, ...]) -> dict[str, float]:
    """The sum of what the pods of these kinds of objects request."""
    total = {"cpu": 0.0, "memory": 0.0}
    for item in (inside for each in objects for inside in native(each) if inside["kind"] in kinds):
        for container in item["spec"]["template"]["spec"]["containers"]:
            for name, text in container["resources"]["requests"].items():
                total[name] += amount(text) * item["spec"].get("parallelism", 1)
    return total


def test_all_fits_a_small_node_one_after_the_other():
    """2 CPUs and 8 GiB, of which Kubernetes' own pods may request half; each Job runs beside the Deployments."""
    files = {name: read(name) for name in FILES if name != "trainjob"}
    beside = [requested(objects, ("Deployment",)) for objects in files.values()]
    for name, objects in files.items():
        jobs = requested(objects, ("Job",))
        for resource, most in {"cpu": 1.0, "memory": 4 * 2**30}.items():
            assert jobs[resource] + sum(each[resource] for each in beside) <= most, (name, resource)


def test_all_name_the_run_that_the_job_trains():
    config = next(item for item in read("job") if item["kind"] == "ConfigMap" and "run.yaml" in item["data"])
    run = yaml.safe_load(config["data"]["run.yaml"])
    commands = [
        container["command"]
        for name in ("pack-job", "evaluate-job", "tensorboard")
        for item in read(name)
        for _, template in templates(item)
        for container in template["spec"]["containers"]
        if container["command"][0] == "naign"
    ]
    assert [command[1] for command in commands] == ["pack", "evaluate", "fetch"]
    assert commands[0][2:] == [run["data"]["source"], "--to", run["data"]["path"]]
    assert commands[1][2] == commands[2][2] == run["run"]["remote"]


def train_job_patch() -> dict[str, Any]:
    """What trainjob.yaml sets of its pods beyond the runtime: a pod template."""
    (job,) = read("trainjob")
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    template: dict[str, Any] = node["template"]["spec"]["template"]
    return template


def test_the_store_is_open_to_the_pods_of_these_manifests_alone():
    (policy,) = (item for item in read("job") if item["kind"] == "NetworkPolicy")
    (rule,) = policy["spec"]["ingress"]
    (source,) = rule["from"]
    allowed, chosen = source["podSelector"]["matchLabels"].items(), policy["spec"]["podSelector"]["matchLabels"].items()
    pods = {name: template for file in FILES for item in read(file) for name, template in templates(item)}
    pods["TrainJob"] = train_job_patch()
    assert len(pods) == 7 and allowed
    assert all(allowed <= template["metadata"]["labels"].items() for template in pods.values())
    assert [name for name, template in pods.items() if chosen <= template["metadata"]["labels"].items()] == [
        "Deployment naign-store"
    ]


def test_a_train_job_is_locked_down_as_the_job_is():
    (job,) = (item for item in read("job") if item["kind"] == "Job")
    wanted, found = job["spec"]["template"]["spec"], train_job_patch()["spec"]
    assert found["securityContext"] == wanted["securityContext"]
    assert found["containers"][0]["securityContext"] == wanted["containers"][0]["securityContext"]


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name != "cpu-smoke"])
def test_an_overlay_says_what_it_requests(name):
    head = (ROOT / f"k8s/overlays/{name}/kustomization.yaml").read_text()
    said = re.search(
        r"^# Requests of a pod: (\d+) GPUs?, (\d+) CPUs, (\d+) GiB. The least node .* (\d+) CPUs and (\d+)", head, re.M
    )
    gpus, *numbers = map(int, said.groups())
    (job,) = (item for item in build(ROOT / "k8s/overlays" / name) if item["kind"] == "Job")
    resources = job["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert [gpus, *numbers[:2]] == [
        int(resources["limits"]["nvidia.com/gpu"]),
        amount(resources["requests"]["cpu"]),
        amount(resources["requests"]["memory"]) / 2**30,
    ]
    assert numbers[2] > numbers[0] and numbers[3] > 1.25 * numbers[1]  # the rest is the node's own
