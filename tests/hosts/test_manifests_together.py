"""The manifests agree with each other: one run, one store, one small node for all of them, one after the other."""

import re
from typing import Any

import yaml

from tests.hosts.manifest_checks import templates
from tests.hosts.test_manifests import FILES, native, only, read

UNITS = {"m": 1e-3, "": 1, "Mi": 2**20, "Gi": 2**30}


def requested(name: str, kind: str) -> dict[str, float]:
    """The sum of what the pods of this kind of objects request in a file: CPUs and bytes."""
    total = {"cpu": 0.0, "memory": 0.0}
    for each in read(name):
        for item in native(each):
            if item["kind"] != kind:
                continue
            for container in item["spec"]["template"]["spec"]["containers"]:
                for resource, text in container["resources"]["requests"].items():
                    number, unit = re.fullmatch(r"(\d+)(m|Mi|Gi|)", text).groups()
                    total[resource] += int(number) * UNITS[unit] * item["spec"].get("parallelism", 1)
    return total


def test_all_fits_a_small_node_one_after_the_other():
    """2 CPUs and 8 GiB, of which Kubernetes' own pods may request half; each Job runs beside the Deployments."""
    files = [name for name in FILES if name != "trainjob"]
    for resource, most in {"cpu": 1.0, "memory": 4 * 2**30}.items():
        beside = sum(requested(name, "Deployment")[resource] for name in files)
        for name in files:
            assert requested(name, "Job")[resource] + beside <= most, (name, resource)


def test_all_name_the_run_that_the_job_trains():
    (config,) = (item for item in read("job") if item["kind"] == "ConfigMap" and "run.yaml" in item["data"])
    run = yaml.safe_load(config["data"]["run.yaml"])
    pack = only(read("pack-job"), "Job")["spec"]["template"]["spec"]["containers"][0]["command"]
    evaluate = only(read("evaluate-job"), "Job")["spec"]["template"]["spec"]["containers"][0]["command"]
    fetch = only(read("tensorboard"), "Deployment")["spec"]["template"]["spec"]["containers"][1]["command"]
    assert pack == ["naign", "pack", run["data"]["source"], "--to", run["data"]["path"]]
    assert evaluate[:2] == ["naign", "evaluate"] and fetch[:2] == ["naign", "fetch"]
    assert evaluate[2] == fetch[2] == run["run"]["remote"]


def train_job_patch() -> dict[str, Any]:
    """What trainjob.yaml sets of its pods beyond the runtime: a pod template."""
    (job,) = read("trainjob")
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    template: dict[str, Any] = node["template"]["spec"]["template"]
    return template


def test_the_store_is_open_to_the_pods_of_these_manifests_alone_and_tensorboard_to_none():
    pods = {"TrainJob": train_job_patch()}
    for file in FILES:
        for item in read(file):
            pods |= dict(templates(item))
    assert len(pods) == 7
    policy = only(read("job"), "NetworkPolicy")["spec"]
    (rule,) = policy["ingress"]
    (source,) = rule["from"]
    chosen = policy["podSelector"]["matchLabels"].items()
    for name, template in pods.items():
        labels = template["metadata"]["labels"].items()
        assert source["podSelector"]["matchLabels"].items() <= labels
        assert (chosen <= labels) == (name == "Deployment naign-store")
    closed = only(read("tensorboard"), "NetworkPolicy")["spec"]
    labels = pods["Deployment naign-tensorboard"]["metadata"]["labels"]
    assert closed["podSelector"]["matchLabels"].items() <= labels.items()
    assert closed["policyTypes"] == ["Ingress"] and closed["ingress"] == []


def test_a_train_job_is_locked_down_as_the_job_is():
    wanted = only(read("job"), "Job")["spec"]["template"]["spec"]
    found = train_job_patch()["spec"]
    assert found["securityContext"] == wanted["securityContext"]
    assert found["containers"][0]["securityContext"] == wanted["containers"][0]["securityContext"]
