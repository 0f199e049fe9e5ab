"""Every manifest is what Kubernetes takes, and means what it should."""

import json
import os
import re
import shutil
from dataclasses import replace

import kubernetes_validate
import pytest
import yaml

from naign.cli.cluster import render
from naign.cluster import launch
from naign.cluster.job import Job
from naign.cluster.render import render_k8s
from naign.errors import BAD_INPUT, INTERRUPTED, PEER_LOST, InputError
from tests.conftest import ROOT
from tests.hosts.manifest_checks import problems, templates
from tests.programs import execute, succeeded

VERSIONS = ("1.29", "1.35", kubernetes_validate.latest_version())
FILES = ("job", "pack-job", "evaluate-job", "tensorboard")


def load(text):
    return [item for item in yaml.safe_load_all(text) if item]


def read(name):
    return load((ROOT / f"k8s/{name}.yaml").read_text())


def only(objects, kind, name=""):
    """The one object of a kind, and with a name that contains `name`."""
    (found,) = (item for item in objects if item["kind"] == kind and name in item["metadata"]["name"])
    return found


def native(item):
    """The object, or what a custom resource holds of objects that every cluster knows."""
    if item["kind"] == "JobSet":
        head = {"apiVersion": "batch/v1", "kind": "Job"}
        jobs = item["spec"]["replicatedJobs"]
        return [head | {"metadata": {"name": job["name"]}, "spec": job["template"]["spec"]} for job in jobs]
    if item["kind"] == "PodMonitor":
        return []
    return [item]


def validate(objects, versions=VERSIONS):
    for item in objects:
        for inside in native(item):
            for version in versions:
                kubernetes_validate.validate(inside, version, strict=True)


@pytest.mark.parametrize("name", FILES)
def test_a_manifest_is_valid_and_means_what_it_should(name):
    objects = read(name)
    validate(objects)
    assert problems(objects) == []


def with_component(component, folder):
    """What kustomize makes of a rendered training and a component. Another Job beside it stays as it is."""
    program = shutil.which("kustomize") or shutil.which("kubectl")
    if program is None:
        pytest.skip("no kustomize or kubectl here (Debian: kustomize)")
    shutil.copytree(ROOT / "k8s", folder / "k8s", dirs_exist_ok=True)
    place = folder / "k8s/try"
    place.mkdir(exist_ok=True)
    (place / "first.yaml").write_text(render_k8s(Job(data="s3://bucket/d", run="s3://bucket/r", nodes="2")))
    shutil.copy(ROOT / "k8s/evaluate-job.yaml", place)
    text = f"resources: [first.yaml, evaluate-job.yaml]\ncomponents: [../components/{component}]\n"
    (place / "kustomization.yaml").write_text(text)
    verb = "build" if program.endswith("kustomize") else "kustomize"
    done = succeeded(execute([program, verb, str(place)], env=os.environ))
    objects = load(done.stdout)
    (beside,) = read("evaluate-job")
    objects.remove(beside)
    return objects


def test_the_queue_component_suspends_the_job(tmp_path):
    job = only(with_component("queue", tmp_path), "Job")
    assert job["spec"]["suspend"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "user-queue"


def test_the_in_place_component_is_valid_where_containers_have_restart_rules(tmp_path):
    job = only(with_component("in-place", tmp_path), "Job")
    validate([job], VERSIONS[VERSIONS.index("1.35") :])
    (rule,) = job["spec"]["template"]["spec"]["containers"][0]["restartPolicyRules"]
    assert rule["action"] == "Restart"
    assert rule["exitCodes"] == {"operator": "NotIn", "values": [0, BAD_INPUT, INTERRUPTED, PEER_LOST]}


def test_the_monitor_component_opens_the_port(tmp_path):
    objects = with_component("monitor", tmp_path)
    validate(objects)
    assert problems(objects) == []  # the PodMonitor's selector and port, too
    (train,) = only(objects, "Job")["spec"]["template"]["spec"]["containers"]
    options, settings = launch.build_parser().parse_known_args(train["command"][2:])
    assert {"name": "metrics", "containerPort": options.metrics} in train["ports"]
    assert settings == ["--config", "/etc/naign/run.yaml"]
    dashboard = only(objects, "ConfigMap", name="naign-dashboard")
    assert json.loads(dashboard["data"]["naign.json"])["panels"]


def rendered(data="s3://bucket/d", run="s3://bucket/r", **changed):
    """The objects of a rendered job by kind and name."""
    found = {}
    for item in load(render_k8s(Job(data=data, run=run, **changed))):
        found[item["kind"] + item["metadata"]["name"]] = item
    return found


@pytest.mark.parametrize(
    ("nodes", "gpus"),
    [
        ("8", 8),
        ("3", 0),
        ("2:4", 8),
    ],
)
def test_what_is_rendered_is_valid(nodes, gpus):
    named = rendered(nodes=nodes, gpus=gpus, config=ROOT / "tests/hosts/size.yaml")
    objects = list(named.values())
    validate(objects)
    assert problems(objects) == []
    assert "naign-store" not in str(objects)
    (container,) = named["Jobr"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == ("naign:cuda" if gpus else "naign:latest")
    limits = container["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == (str(gpus) if gpus else None)


def test_a_jobset_has_the_same_pods():
    wanted = rendered(nodes="2", gpus=8, config=ROOT / "tests/hosts/size.yaml")["Jobr"]["spec"]["template"]
    named = rendered(kind="jobset", nodes="2", gpus=8, config=ROOT / "tests/hosts/size.yaml")
    objects = list(named.values())
    validate(objects)
    assert problems(objects) == []
    assert sorted(named)[:2] == ["ConfigMapr", "ConfigMapr.store"] and len(named) == 3
    ((_, template),) = templates(objects[-1])
    for key in ("securityContext", "terminationGracePeriodSeconds", "volumes", "tolerations"):
        assert template["spec"][key] == wanted["spec"][key]
    (container,) = template["spec"]["containers"]
    (other,) = wanted["spec"]["containers"]
    variables = {item["name"]: item.get("value") for item in container["env"]}
    assert (variables["NAIGN_HOSTS"], variables["NAIGN_HEAD"]) == ("2", "r-train-0-0.r")
    for key in ("image", "command", "resources", "securityContext", "volumeMounts"):
        assert container[key] == other[key]


@pytest.mark.parametrize(
    "place",
    [
        "gs://a_bucket",
        "az://container",
        "abfss://container@account.dfs.core.windows.net",
    ],
)
def test_buckets_of_other_clouds(place):
    named = rendered(data=f"{place}/d", run=f"{place}/runs/r")
    config = yaml.safe_load(named["ConfigMapr"]["data"]["run.yaml"])
    assert (config["data"]["path"], config["run"]["remote"]) == (f"{place}/d", f"{place}/runs/r")
    labels = named["Jobr"]["spec"]["template"]["metadata"]["labels"]
    assert ("azure.workload.identity/use" in labels) == place.startswith("abfss")


def test_a_volume_in_place_of_a_bucket():
    named = rendered(claim="shared", data="mnist", run="runs/r", nodes="2")
    objects = list(named.values())
    validate(objects)
    assert problems(objects) == []
    config = yaml.safe_load(named["ConfigMapr"]["data"]["run.yaml"])
    assert config["data"]["path"] == "/claim/mnist"
    assert config["run"] | {"path": "/claim/runs/r", "remote": ""} == config["run"]
    pod = named["Jobr"]["spec"]["template"]["spec"]
    assert pod["volumes"][-1] == {"name": "claim", "persistentVolumeClaim": {"claimName": "shared"}}
    assert pod["containers"][0]["volumeMounts"][-1] == {"name": "claim", "mountPath": "/claim"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("k8s", "--data", "data/mnist", "--run", "s3://bucket/run"), "pods share a bucket, or a volume by --claim"),
        (("k8s", "--data", "d", "--run", "https://me:SECRET@host/r"), "https://: the address holds a user"),
    ],
)
def test_what_cannot_be_rendered_is_refused(options, said, naign):
    done = naign("render", *options)
    assert done.returncode == BAD_INPUT
    assert said in done.stderr and "SECRET" not in done.stderr


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data": "s3://x/d"}, "--data: pods share a bucket, or a volume by --claim: write s3://bucket/prefix"),
        ({"run": "s3://bucket/r\n#"}, "--run: pods"),
        ({"run": "s3://me:SEC RET@bucket/r"}, "--run: pods"),
        ({"claim": "shared"}, "--data: with --claim=shared write a path in that volume"),
        ({"claim": "shared", "data": "d", "run": "../r"}, "--run: with --claim=shared write a path"),
        ({"claim": "My Claim", "data": "d", "run": "r"}, "--claim: give the name of a PersistentVolumeClaim"),
        ({"claim": "shared", "data": "d", "run": "./d"}, "--run: with --claim=shared write a path"),
        ({"data": "s3://bucket/../d"}, "an empty, '.' or '..' part"),
        ({"service_account": "a b"}, "--service-account: give the name of a ServiceAccount"),
        ({"engine": "cpu", "gpus": 8}, "--engine cpu does not go with --gpus 8"),
        ({"engine": "fsdp", "gpus": 0}, "--engine fsdp does not go with --gpus 0"),
        ({"data": "az://container/d", "service_account": "s"}, "az:// does not name the account"),
        ({"data": "s3://bucket/r/"}, "--data and --run are the same place"),
        ({"engine": "zero9"}, "--engine zero9 is neither a file nor a name in launch/"),
        ({"engine": "my/zero2.yaml"}, "--engine: give the name of a file in launch/"),
        ({"endpoint": "http://me:SECRET@host"}, "--endpoint: write http://host:port"),
        ({"nodes": "3", "gpus": 8}, "cannot be shared by 24 ranks"),
        ({"nodes": "0"}, "0 nodes"),
        ({"nodes": "2:1"}, "--nodes is 2:1: give a number of hosts, or the least, 2 or more, and the most"),
        ({"nodes": "two"}, "--nodes is 'two': it must be a number"),
        ({"nodes": "٣"}, "--nodes is '٣': it must be a number"),
        ({"run": "s3://bucket/seed_1"}, "--name: give one of small letters"),
        ({"run": "s3://bucket/2024-06-01"}, "--name: give one of small letters"),
    ],
)
def test_what_no_cluster_could_use_is_refused(changed, said):
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        rendered(**changed)
    assert "SEC" not in str(caught.value)


@pytest.mark.parametrize(("text", "within"), [("{}", 60), ("stop: {within: 0.5}", 0.5)])
def test_the_grace_period_follows_stop_within(text, within, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    objects = rendered(config=tmp_path / "run.yaml")
    assert yaml.safe_load(objects["ConfigMapr"]["data"]["run.yaml"])["stop"]["within"] == within
    seconds = objects["Jobr"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert seconds == -(-within // 1) + 30


def test_runs_share_no_object():
    """A run named as another one with an ending has none of its objects."""
    assert not rendered(name="x").keys() & rendered(name="x-store").keys()


def test_a_second_run_under_one_name_is_refused():
    """The API server takes no change of an immutable ConfigMap."""
    first = rendered()
    assert first == rendered()
    assert first["ConfigMapr"]["immutable"] and first["ConfigMapr.store"]["immutable"]


def test_a_role_has_no_keys_beside_it():
    assert "secretRef" in str(rendered()["Jobr"])
    assert "secretRef" not in str(rendered(service_account="naign")["Jobr"])
    bucket = Job(data="s3://bucket/d", run="s3://bucket/r")
    assert "by the Secret naign-s3" in render_k8s(bucket)
    assert "by the Secret naign-s3" not in render_k8s(replace(bucket, service_account="naign"))


@pytest.mark.parametrize(("endpoint", "warned"), [("", True), ("http://store:8333", False)])
def test_an_endpoint_that_the_manifests_lack_is_noticed(endpoint, warned, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:8333")
    render("k8s", job=Job(data="s3://bucket/d", run="s3://bucket/r", endpoint=endpoint))
    assert ("AWS_ENDPOINT_URL is set here and not in the manifests" in capsys.readouterr().err) == warned


def test_nothing_secret_stands_in_a_manifest():
    for file in (ROOT / "k8s").rglob("*.yaml"):
        text = file.read_text().replace("--from-literal=AWS_SECRET_ACCESS_KEY=...", "")
        assert "kind: Secret" not in text and "AWS_SECRET_ACCESS_KEY" not in text


def test_ci_names_the_packages_that_it_lacks_and_fails_where_one_cannot_be_installed(tmp_path):
    tools = {
        "apt-get": 'case "$*" in *prometheus*|*munge*) exit 100 ;; esac',
        "apt-cache": 'case "$*" in *munge*) exit 1 ;; esac',
        "id": "echo 0",
        "make": 'echo "made $1" >> made',
    }
    (tmp_path / "bin").mkdir()
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    for in_ci, code in (("true", 1), ("", 0)):
        environ = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CI": in_ci}
        done = execute([tmp_path / ".ci/run"], env=environ)
        assert done.returncode == code, done.stderr
        assert "apt-get cannot install prometheus: skipped in tests/observe/test_monitor.py" in done.stdout
        assert "there is no package munge here: skipped in tests/hosts/test_slurm.py" in done.stdout
        assert ("made test" in (tmp_path / "made").read_text()) == (not in_ci)
