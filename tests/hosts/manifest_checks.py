"""What a schema does not check in manifests: names that must agree, objects that must exist, pods that must be locked.

Manifests are ours, in k8s/ or from `naign render`, so what these checks find is a defect of the project.
"""

import yaml

from naign.config import check, from_dict
from naign.errors import InputError

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
"""Kinds that the Pod Security level `restricted` allows."""


def problems(objects):
    """A sentence for each thing that is wrong in the objects of one `kubectl apply`; [] if all is well."""
    found = []
    for item in objects:
        found += _of(item, objects)
    return found


def templates(item):
    """The pod templates in an object, each with a name for messages."""
    name = f"{item['kind']} {item['metadata']['name']}"
    if item["kind"] in ("Job", "Deployment"):
        return [(name, item["spec"]["template"])]
    if item["kind"] == "JobSet":
        jobs = item["spec"]["replicatedJobs"]
        return [(f"{name} {job['name']}", job["template"]["spec"]["template"]) for job in jobs]
    return []


def _of(item, objects):
    kind = item["kind"]
    name = f"{kind} {item['metadata']['name']}"
    if kind == "Service":
        yield from _reaches(name, item["spec"]["selector"], item["spec"]["ports"], objects)
    if kind == "NetworkPolicy":
        selector = item["spec"]["podSelector"]["matchLabels"]
        ports = [entry for rule in item["spec"]["ingress"] for entry in rule["ports"]]
        yield from _reaches(name, selector, ports, objects)
    if kind == "PodMonitor":
        selector = item["spec"]["selector"]["matchLabels"]
        yield from _reaches(name, selector, item["spec"]["podMetricsEndpoints"], objects)
    if kind == "Job":
        yield from _of_job(name, item, objects)
    if kind == "ConfigMap" and "run.yaml" in item["data"]:
        try:
            check(from_dict(yaml.safe_load(item["data"]["run.yaml"]), where="run.yaml"))
        except InputError as error:
            yield f"{name}: {error}"
    for title, template in templates(item):
        yield from _of_pod(title, template["spec"], objects)


def _reaches(name, selector, ports, objects):
    """What is wrong with an object `name` that selects pods and names ports of theirs."""
    selected = []
    for other in objects:
        for _, template in templates(other):
            if selector.items() <= template["metadata"]["labels"].items():
                selected.append(template)
    if not selected:
        yield f"{name} selects no pod"
    for template in selected:
        known = set()
        for container in template["spec"]["containers"]:
            for port in container.get("ports", []):
                known |= {port["name"], port["containerPort"]}
        for port in ports:
            target = port.get("targetPort", port["port"])
            if target not in known:
                yield f"{name}: no container has the port {target}"


def _of_job(name, item, objects):
    spec = item["spec"]
    if spec.get("completionMode") != "Indexed":
        return
    pod = spec["template"]["spec"]
    if pod["restartPolicy"] != "Never":
        yield f"{name}: podFailurePolicy needs restartPolicy: Never"
    (container,) = pod["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    hosts = variables["NAIGN_HOSTS"].rpartition(":")[2]
    if not spec["completions"] == spec["parallelism"] == int(hosts):
        yield f"{name}: completions, parallelism and NAIGN_HOSTS are not the same"
    if variables["NAIGN_HEAD"] != f"{item['metadata']['name']}-0.{pod['subdomain']}":
        yield f"{name}: NAIGN_HEAD is {variables['NAIGN_HEAD']}, not the name of the first pod"
    headless = set()
    configs = {}
    for other in objects:
        if other["kind"] == "Service" and other["spec"].get("clusterIP") == "None":
            headless.add(other["metadata"]["name"])
        if other["kind"] == "ConfigMap":
            configs[other["metadata"]["name"]] = other["data"]
    if pod["subdomain"] not in headless:
        yield f"{name}: subdomain {pod['subdomain']} is no headless Service here"
    config = yaml.safe_load(configs[pod["volumes"][0]["configMap"]["name"]]["run.yaml"])
    if config["stop"]["within"] + 10 > pod["terminationGracePeriodSeconds"]:
        yield f"{name}: terminationGracePeriodSeconds leaves no time beyond stop.within"


def _of_pod(name, pod, objects):
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            yield f"{name}: {key}"
    context = pod.get("securityContext", {})
    if not context.get("runAsNonRoot") or context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{name}: not runAsNonRoot with the default seccomp profile"
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for volume in volumes.values():
        if not set(volume) - {"name"} <= VOLUMES:
            yield f"{name}: volume {volume['name']} is of a kind that `restricted` forbids"
        if "configMap" in volume:
            yield from _config_map(name, volume["configMap"], objects)
    for container in pod["containers"]:
        what = f"{name}, container {container['name']}"
        locked = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        if container.get("securityContext") != locked:
            yield f"{what}: not locked down"
        if "memory" not in container["resources"].get("limits", {}):
            yield f"{what}: no limit of memory"
        for source in container.get("envFrom", []):
            if "secretRef" in source and not source["secretRef"].get("optional"):
                yield f"{what}: needs the Secret {source['secretRef']['name']}, which is not here"
            if "configMapRef" in source:
                yield from _config_map(what, source["configMapRef"], objects)


def _config_map(what, wanted, objects):
    if wanted.get("optional"):
        return
    found = [item for item in objects if item["kind"] == "ConfigMap" and item["metadata"]["name"] == wanted["name"]]
    if not found:
        yield f"{what}: no ConfigMap {wanted['name']} here"
