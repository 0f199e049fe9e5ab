"""The manifests agree with each other: one run and one store."""

import yaml

from tests.hosts.manifest_checks import templates
from tests.hosts.test_manifests import FILES, only, read


def container(name, kind, number=0):
    """A container of the only object of that kind in a file."""
    found = only(read(name), kind)["spec"]["template"]["spec"]["containers"][number]
    return found


def test_all_name_the_run_that_the_job_trains():
    config = read("job")[1]
    run = yaml.safe_load(config["data"]["run.yaml"])
    pack = container("pack-job", "Job")["command"]
    evaluate = container("evaluate-job", "Job")["command"]
    fetch = container("tensorboard", "Deployment", 1)["command"]
    assert pack == ["naign", "pack", run["data"]["source"], "--to", run["data"]["path"]]
    assert evaluate[:2] == ["naign", "evaluate"] and fetch[:2] == ["naign", "fetch"]
    assert evaluate[2] == fetch[2] == run["run"]["remote"]


def test_the_store_is_open_to_the_pods_of_these_manifests_alone_and_tensorboard_to_none():
    pods = {}
    for file in FILES:
        for item in read(file):
            pods |= dict(templates(item))
    assert len(pods) == 5
    policy = only(read("job"), "NetworkPolicy")["spec"]
    source = policy["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    chosen = policy["podSelector"]["matchLabels"]
    for name, template in pods.items():
        labels = template["metadata"]["labels"].items()
        assert source.items() <= labels
        assert (chosen.items() <= labels) == (name == "Deployment naign-store")
    closed = only(read("tensorboard"), "NetworkPolicy")["spec"]
    labels = pods["Deployment naign-tensorboard"]["metadata"]["labels"]
    assert closed["podSelector"]["matchLabels"].items() <= labels.items()
    assert closed["policyTypes"] == ["Ingress"] and closed["ingress"] == []
