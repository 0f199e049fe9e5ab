"""Every manifest and overlay is what Kubernetes takes, and means what it should."""

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from naign.cli.cluster import render
from naign.cluster import launch
from naign.cluster.job import Job, name_after
from naign.cluster.render import IMAGE, predict, render_k8s
from naign.errors import BAD_INPUT, INTERRUPTED, PEER_LOST, InputError
from tests.conftest import ROOT
from tests.hosts.manifest_checks import problems, templates

VERSIONS = ("1.29", "1.31", "1.33", "1.34", "1.35", kubernetes_validate.latest_version())
FILES = ("job", "pack-job", "evaluate-job", "tensorboard", "jobset", "trainjob")
OVERLAYS = sorted(path.name for path in (ROOT / "k8s/overlays").iterdir())


def load(text: str) -> list[dict[str, Any]]:
    return [item for item in yaml.safe_load_all(text) if item]


def read(name: str) -> list[dict[str, Any]]:
    return load((ROOT / f"k8s/{name}.yaml").read_text())


def build(folder: Path) -> list[dict[str, Any]]:
    program = shutil.which("kustomize") or shutil.which("kubectl")
    if program is None:
        pytest.skip("no kustomize or kubectl here (Debian: kustomize)")
    verb = "build" if program.endswith("kustomize") else "kustomize"
    done = subprocess.run([program, verb, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load(done.stdout)


def native(item: dict[str, Any]) -> list[dict[str, Any]]:
    """The object, or what a custom resource holds of objects that every cluster knows."""
    if item["kind"] == "JobSet":
        jobs = item["spec"]["replicatedJobs"]
        head = {"apiVersion": "batch/v1", "kind": "Job"}
        return [head | {"metadata": {"name": job["name"]}, "spec": job["template"]["spec"]} for job in jobs]
    return [] if item["kind"] in ("TrainJob", "PodMonitor") else [item]


@pytest.mark.parametrize("name", FILES)
def test_a_manifest_is_valid_and_means_what_it_should(name):
    objects = read(name)
    for version in VERSIONS:
        for item in objects:
            for inside in native(item):
                kubernetes_validate.validate(inside, version, strict=True)
    beside = [item for item in read("job") if item["kind"] == "ConfigMap"] if name == "jobset" else []
    assert problems([*objects, *beside]) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_valid_and_means_what_it_should(name):
    objects = build(ROOT / "k8s/overlays" / name)
    for version in VERSIONS:
        for item in objects:
            kubernetes_validate.validate(item, version, strict=True)
    assert problems(objects) == []
    (job,) = (item for item in objects if item["kind"] == "Job")
    assert ("secretRef" in str(job)) == (name != "eks-irsa")  # its keys would go before the role
    limits = job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = {"cpu-smoke": None, "one-gpu": "1", "eks-irsa": "1"}.get(name, "8")
    assert limits.get("nvidia.com/gpu") == gpus
    assert ("naign-store" in [item["metadata"]["name"] for item in objects if item["kind"] == "Deployment"]) == (
        not gpus
    )


def with_component(component: str, resource: str, folder: Path, rendered: str = "") -> list[dict[str, Any]]:
    """The objects of a resource beside a component, built in a copy of k8s/. A Job beside it is left as it is."""
    shutil.copytree(ROOT / "k8s", folder / "k8s")
    (folder / "k8s/try").mkdir()
    (folder / "k8s/try/first.yaml").write_text(rendered)
    shutil.copy(ROOT / "k8s/evaluate-job.yaml", folder / "k8s/try")
    text = f"resources: [{resource}, evaluate-job.yaml]\ncomponents: [../components/{component}]\n"
    (folder / "k8s/try/kustomization.yaml").write_text(text)
    objects, (beside,) = build(folder / "k8s/try"), read("evaluate-job")
    objects.remove(beside)
    return objects


def test_the_queue_component_suspends_the_job(tmp_path):
    (job,) = (item for item in with_component("queue", "../base", tmp_path) if item["kind"] == "Job")
    assert job["spec"]["suspend"] and job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert "annotations" not in job["spec"]["template"]["metadata"]
    component = tmp_path / "k8s/components/queue/kustomization.yaml"
    component.write_text(component.read_text().replace("      # - {", "      - {"))
    job, _ = (item for item in build(tmp_path / "k8s/try") if item["kind"] == "Job")  # in the order of the resources
    annotations = {"kueue.x-k8s.io/podset-preferred-topology": "kubernetes.io/hostname"}
    assert job["spec"]["suspend"] and job["spec"]["template"]["metadata"]["annotations"] == annotations


def test_the_in_place_component_is_valid_where_containers_have_restart_rules(tmp_path):
    (job,) = (item for item in with_component("in-place", "../base", tmp_path) if item["kind"] == "Job")
    for version in VERSIONS[VERSIONS.index("1.35") :]:
        kubernetes_validate.validate(job, version, strict=True)
    (rule,) = job["spec"]["template"]["spec"]["containers"][0]["restartPolicyRules"]
    assert {0, BAD_INPUT, INTERRUPTED, PEER_LOST} == set(rule["exitCodes"]["values"])
    assert rule["action"] == "Restart" and rule["exitCodes"]["operator"] == "NotIn"


@pytest.mark.parametrize("resource", ["../base", "../overlays/multi-node", "first.yaml"])
def test_the_monitor_component_opens_the_port_and_probes_it(resource, tmp_path):
    text = render_k8s(Job(data="s3://bucket/d", run="s3://bucket/r", nodes=2))
    objects = with_component("monitor", resource, tmp_path, text)
    for version in VERSIONS:
        for item in objects:
            for inside in native(item):
                kubernetes_validate.validate(inside, version, strict=True)
    assert problems(objects) == []  # the PodMonitor's selector and port, too
    (job,) = (item for item in objects if item["kind"] == "Job")
    (train,) = job["spec"]["template"]["spec"]["containers"]
    options, settings = launch.build_parser().parse_known_args(train["command"][2:])
    assert {"name": "metrics", "containerPort": options.metrics} in train["ports"]
    assert settings == ["--config", "/etc/naign/run.yaml"]
    probe = train["livenessProbe"]
    assert probe["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 900  # a checkpoint on its way to a slow bucket
    (dashboard,) = (item for item in objects if item["metadata"]["name"] == "naign-dashboard")
    assert json.loads(dashboard["data"]["naign.json"])["panels"]


def rendered(**changed: Any) -> dict[str, dict[str, Any]]:
    job = Job(**{"data": "s3://bucket/d", "run": "s3://bucket/r", **changed})
    return {item["kind"] + item["metadata"]["name"]: item for item in load(render_k8s(job))}


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 8), (8, 8), (3, 0)])
def test_what_is_rendered_is_valid(nodes, gpus):
    objects = [*rendered(nodes=nodes, gpus=gpus, config=ROOT / "tests/hosts/size.yaml").values()]
    for version in VERSIONS:
        for item in objects:
            kubernetes_validate.validate(item, version, strict=True)
    assert problems(objects) == [] and not any(item["metadata"]["name"].startswith("naign-store") for item in objects)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("k8s", "--data", "data/mnist", "--run", "s3://bucket/run"), "pods share a bucket only"),
        (("slurm", "--data", "d", "--run", "https://me:SECRET@host/r"), "https://: the address holds a user"),
    ],
)
def test_what_cannot_be_rendered_is_refused(options, said, naign):
    done = naign("render", *options)
    assert done.returncode == 2 and said in done.stderr and "SECRET" not in done.stderr


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data": "s3://x/d"}, "--data s3://x/d: write s3://bucket/prefix"),
        ({"run": "s3://buc..ket/r"}, "--run s3://buc..ket/r: write"),
        ({"run": "s3://Bucket/r"}, "--run s3://Bucket/r: write"),
        ({"run": "s3://bucket/r\n#"}, "--run s3://bucket/r?#: write"),
        ({"run": "s3://me:SEC RET@bucket/r"}, "--run ...@bucket/r: write"),
        ({"data": "me:SECRET@host"}, "--data ...@host: pods share"),
        ({"image": "me:SECRET@host/a"}, "--image ...@host/a is no name"),
        ({"region": "a\x1bb"}, "--region a?b is no name"),
        ({"service_account": "a\nb"}, "--service-account a?b is no name"),
        ({"image": "No Image"}, "is no name of an image"),
        ({"nodes": 3, "gpus": 8}, "cannot be shared by 24 ranks"),
        ({"nodes": 0}, "0 nodes"),
    ],
)
def test_what_no_cluster_could_use_is_refused(changed, said):
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        rendered(**changed)
    assert "SEC" not in str(caught.value)


def test_what_is_an_image():
    for image in ("naign", "me/naign:cuda", "localhost:5000/a/b__c--d:V1_x", f"a.b/c@sha256:{'0' * 64}"):
        assert re.fullmatch(IMAGE, image, re.ASCII), image
    for image in ("", "a:", "a//b", "a/", "a:b:c", "a..b", "a@sha256:0", "Naign", "a:-x", "a\n", "é", "-a"):
        assert not re.fullmatch(IMAGE, image, re.ASCII), image


def test_the_grace_period_follows_stop_within(tmp_path):
    for text, within in (("{}", 60), ("stop: {within: 20}", 20), ("stop: {within: 0.5}", 0.5), ("stop:", 60)):
        (tmp_path / "run.yaml").write_text(text)
        objects = rendered(config=tmp_path / "run.yaml")
        assert yaml.safe_load(objects["ConfigMapr"]["data"]["run.yaml"])["stop"]["within"] == within
        seconds = objects["Jobr"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert seconds == -(-within // 1) + 30


def test_runs_that_differ_have_names_that_differ():
    assert name_after("s3://bucket/runs/seed-1") == "seed-1" and name_after("runs/first/") == "first"
    odd = [
        "2024-06-01",
        "2024-06-02",
        "训练",
        "训练二",
        "seed_1",
        "Seed-1",
        "a" * 50 + "1",
        "a" * 50 + "2",
        "-a-",
        "\udcff",
    ]
    names = [name_after(f"s3://bucket/{last}") for last in odd]
    assert len({*names, "seed-1"}) == len(odd) + 1
    for name in names:
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", name), name


def test_runs_share_no_object():
    """A run named as another one with an ending has none of its objects."""
    kinds = [set(rendered(name=name)) for name in ("x", "x-store", "x-store-store")]
    assert not kinds[0] & kinds[1] and not kinds[1] & kinds[2] and not kinds[0] & kinds[2]


def test_a_second_run_under_one_name_is_refused():
    """The API server takes no change of a Job's pod template, nor of an immutable ConfigMap."""
    first, again = rendered(), rendered()
    assert first == again and first["ConfigMapr"]["immutable"] and first["ConfigMapr.store"]["immutable"]
    for other in (rendered(data="s3://bucket/other"), rendered(region="eu-west-1")):
        assert other["Jobr"]["spec"]["template"] != first["Jobr"]["spec"]["template"]


def test_a_role_has_no_keys_beside_it():
    assert "secretRef" in str(rendered()["Jobr"]) and "secretRef" not in str(rendered(service_account="naign")["Jobr"])


def test_the_computation_of_a_run_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("naign.observe.speed.forward_flops", lambda network, shape: 10**9)
    (tmp_path / "run.yaml").write_text(
        "{objective: {imle: 0.3, denoising: 0}, train: {images: 4096, batch: 64}, match: {round: 1024, ratio: 2}}"
    )
    table = predict(Job(nodes=2, gpus=4, data="nowhere", run="r", config=tmp_path / "run.yaml"))
    assert "GPUs          8, 8 images a step each\n" in table and "prior 0.42 M" in table
    assert "a checkpoint  0.012 GB" in table  # 5.7 MB of f and its moments, 6.7 MB of the mixture and its statistics
    assert "fit 6.1, learn (the prior) not counted; 0." in table
    assert "a round       8.2 TFLOP: generate 2, search at most 0.0033, fit 6.1" in table
    assert "the run       4 rounds, 0.028 PFLOP" in table  # the last 16 % of it is the prior's
    assert "nowhere cannot be read from here: nowhere: no data set here" in table


def test_an_endpoint_that_the_manifests_lack_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr("naign.cluster.render.predict", lambda job: "")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:8333")
    for endpoint, warned in (("", True), ("http://store:8333", False)):
        render("k8s", job=Job(data="s3://bucket/d", run="s3://bucket/r", endpoint=endpoint))
        assert ("AWS_ENDPOINT_URL is set here and not in the manifests" in capsys.readouterr().err) == warned


def test_a_slurm_script_is_rendered(naign):
    done = naign("render", "slurm", "--nodes", "4", "--gpus", "2", "--data", "/shared/mnist", "--run", "/shared/runs/a")
    assert done.returncode == 0, done.stderr
    for line in (
        "#SBATCH --nodes=4",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --mem=32G",
        "#SBATCH --job-name=a\n",
        "#   sbatch FILE\n",
        "tail -f a-*-host*.log",
        "--data.path=/shared/mnist --run.path=/shared/runs/a",
    ):
        assert line in done.stdout
    assert "launch/slurm.sbatch" not in done.stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0


def test_the_manifest_that_is_applied_by_its_address_is_the_overlays_base():
    """A link would be downloaded as its target's name, which `kubectl apply -f https://...` takes for YAML."""
    file, base = ROOT / "k8s/job.yaml", ROOT / "k8s/base/job.yaml"
    assert not file.is_symlink()
    head, _, rest = file.read_text().partition("\n")
    assert head.startswith("#") and "make k8s/job.yaml" in head and rest == base.read_text()


def test_nothing_secret_stands_in_a_manifest():
    for file in (ROOT / "k8s").rglob("*.yaml"):
        text = file.read_text()
        assert "kind: Secret" not in text and "AWS_SECRET_ACCESS_KEY" not in text.replace(
            "--from-literal=AWS_SECRET_ACCESS_KEY=...", ""
        )


def test_what_is_wrong_is_found():
    """Of each kind of mistake that `problems` looks for, one."""

    def wrong(kind: str, name: str, change: Any) -> str:
        objects = copy.deepcopy(read("job"))
        item = next(item for item in objects if item["kind"] == kind and item["metadata"]["name"] == name)
        change(item)
        return "\n".join(problems(objects))

    def pod(change: Any) -> str:
        return wrong("Job", "naign", lambda item: change(templates(item)[0][1]["spec"]))

    assert "selects no pod" in wrong("Service", "naign", lambda item: item["spec"]["selector"].update(a="b"))
    assert "no container has the port 1" in wrong(
        "Service", "naign", lambda item: item["spec"]["ports"][0].update(port=1)
    )
    assert "no container has the port 1" in wrong(
        "NetworkPolicy", "naign-store", lambda item: item["spec"]["ingress"][0]["ports"][0].update(port=1)
    )
    monitor = load((ROOT / "k8s/components/monitor/pod-monitor.yaml").read_text())
    assert "no container has the port metrics" in "\n".join(problems([*read("job"), *monitor]))
    assert "are not the same" in wrong("Job", "naign", lambda item: item["spec"].update(completions=3))
    assert "not the name of the first pod" in pod(lambda spec: spec.update(subdomain="other"))
    assert "no headless Service" in pod(lambda spec: spec.update(subdomain="other"))
    assert "restartPolicy" in pod(lambda spec: spec.update(restartPolicy="OnFailure"))
    assert "leaves no time" in pod(lambda spec: spec.update(terminationGracePeriodSeconds=30))
    assert "hostNetwork" in pod(lambda spec: spec.update(hostNetwork=True))
    assert "not runAsNonRoot" in pod(lambda spec: spec["securityContext"].pop("runAsNonRoot"))
    assert "not locked down" in pod(lambda spec: spec["containers"][0]["securityContext"].pop("capabilities"))
    assert "that `restricted` forbids" in pod(lambda spec: spec["volumes"][1].update(hostPath={"path": "/"}))
    assert "no volume" in pod(lambda spec: spec["volumes"].pop())
    assert "no ConfigMap other" in pod(lambda spec: spec["volumes"][0]["configMap"].update(name="other"))
    assert "no limit of memory" in pod(lambda spec: spec["containers"][0]["resources"].pop("limits"))
    assert "needs the Secret" in pod(lambda spec: spec["containers"][0]["envFrom"][1]["secretRef"].pop("optional"))
    config = "train: {batch: 0}"
    assert "train.batch is 0" in wrong("ConfigMap", "naign", lambda item: item["data"].update({"run.yaml": config}))
