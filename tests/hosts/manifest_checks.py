"""What a schema does not check in manifests: names that must agree, objects that must exist, pods that must be locked.

Manifests are ours, in k8s/ or from `naign render`, so what these checks find is a defect of the project.
"""

from collections.abc import Iterator
from typing import Any

import yaml

from naign.config import check, from_dict
from naign.errors import InputError

Object = dict[str, Any]

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
"""Kinds that the Pod Security level `restricted` allows."""


def problems(objects: list[Object]) -> list[str]:
    """A sentence for each thing that is wrong in the objects of one `kubectl apply`; [] if all is well."""
    return [problem for item in objects for problem in _of(item, objects)]


def templates(item: Object) -> list[tuple[str, Object]]:
    """The pod templates in an object, each with a name for messages."""
    name = f"{item['kind']} {item['metadata']['name']}"
    if item["kind"] in ("Job", "Deployment"):
        return [(name, item["spec"]["template"])]
    if item["kind"] == "JobSet":
        return [
            (f"{name} {job['name']}", job["template"]["spec"]["template"]) for job in item["spec"]["replicatedJobs"]
        ]
    return []


def _of(item: Object, objects: list[Object]) -> Iterator[str]:
    if item["kind"] == "Service":
        yield from _reaches(
            f"Service {item['metadata']['name']}", item["spec"]["selector"], item["spec"]["ports"], objects
        )
    if item["kind"] == "NetworkPolicy":
        selector = item["spec"]["podSelector"]["matchLabels"]
        ports = [entry for rule in item["spec"]["ingress"] for entry in rule["ports"]]
        yield from _reaches(f"NetworkPolicy {item['metadata']['name']}", selector, ports, objects)
    if item["kind"] == "PodMonitor":
        selector = item["spec"]["selector"]["matchLabels"]
        yield from _reaches(
            f"PodMonitor {item['metadata']['name']}", selector, item["spec"]["podMetricsEndpoints"], objects
        )
    if item["kind"] == "Job":
        yield from _of_job(item, objects)
    if item["kind"] == "ConfigMap" and "run.yaml" in item["data"]:
        try:
            check(from_dict(yaml.safe_load(item["data"]["run.yaml"]), where="run.yaml"))
        except InputError as error:
            yield f"ConfigMap {item['metadata']['name']}: {error}"
    for name, template in templates(item):
        yield from _of_pod(name, template["spec"], objects)


def _reaches(name: str, selector: Object, ports: list[Object], objects: list[Object]) -> Iterator[str]:
    """What is wrong with an object `name` that selects pods and names ports of theirs."""
    found = [
        template
        for other in objects
        for _, template in templates(other)
        if selector.items() <= template["metadata"]["labels"].items()
    ]
    if not found:
        yield f"{name} selects no pod"
    for template in found:
        opened = [port for container in template["spec"]["containers"] for port in container.get("ports", [])]
        known = {port["name"] for port in opened} | {port["containerPort"] for port in opened}
        for port in ports:
            if port.get("targetPort", port["port"]) not in known:
                yield f"{name}: no container has the port {port.get('targetPort', port['port'])}"


def _of_job(item: Object, objects: list[Object]) -> Iterator[str]:
    name, spec = f"Job {item['metadata']['name']}", item["spec"]
    pod = spec["template"]["spec"]
    containers = {container["name"]: container for container in pod["containers"]}
    for rule in spec.get("podFailurePolicy", {}).get("rules", []):
        if rule.get("onExitCodes", {}).get("containerName", next(iter(containers))) not in containers:
            yield f"{name}: podFailurePolicy speaks of a container that is not there"
    if spec.get("podFailurePolicy") and pod["restartPolicy"] != "Never":
        yield f"{name}: podFailurePolicy needs restartPolicy: Never"
    if spec.get("completionMode") != "Indexed":
        return
    variables = {item["name"]: item.get("value") for item in containers["train"]["env"]}
    if not spec["completions"] == spec["parallelism"] == int(variables["NAIGN_HOSTS"]):
        yield f"{name}: completions, parallelism and NAIGN_HOSTS are not the same"
    if variables["NAIGN_HEAD"] != f"{item['metadata']['name']}-0.{pod['subdomain']}":
        yield f"{name}: NAIGN_HEAD is {variables['NAIGN_HEAD']}, not the name of the first pod"
    services = [other for other in objects if other["kind"] == "Service" and other["spec"].get("clusterIP") == "None"]
    if pod["subdomain"] not in [service["metadata"]["name"] for service in services]:
        yield f"{name}: subdomain {pod['subdomain']} is no headless Service here"
    for volume in pod["volumes"]:
        for other in objects:
            source = volume.get("configMap", {}).get("name")
            if other["kind"] == "ConfigMap" and other["metadata"]["name"] == source:
                within = (yaml.safe_load(other["data"]["run.yaml"]).get("stop") or {}).get("within", 25)
                if within + 10 > pod["terminationGracePeriodSeconds"]:
                    yield f"{name}: terminationGracePeriodSeconds leaves no time beyond stop.within={within}"


def _of_pod(name: str, pod: Object, objects: list[Object]) -> Iterator[str]:
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            yield f"{name}: {key}"
    context = pod.get("securityContext", {})
    if not context.get("runAsNonRoot") or context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{name}: not runAsNonRoot with the default seccomp profile"
    if pod.get("enableServiceLinks", True):
        yield f"{name}: enableServiceLinks puts variables of other Services among ours"
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for volume in volumes.values():
        if not set(volume) - {"name"} <= VOLUMES:
            yield f"{name}: volume {volume['name']} is of a kind that `restricted` forbids"
        if "configMap" in volume:
            keys = [item["key"] for item in volume["configMap"].get("items", [])]
            yield from _config_map(name, volume["configMap"], keys, objects)
    for container in pod["containers"]:
        what = f"{name}, container {container['name']}"
        locked = container.get("securityContext", {})
        if (
            locked.get("allowPrivilegeEscalation") is not False
            or locked.get("capabilities", {}).get("drop") != ["ALL"]
            or not locked.get("readOnlyRootFilesystem")
        ):
            yield f"{what}: not locked down"
        if "memory" not in container["resources"].get("limits", {}):
            yield f"{what}: no limit of memory"
        for mounted in container.get("volumeMounts", []):
            if mounted["name"] not in volumes:
                yield f"{what}: no volume {mounted['name']}"
        for source in container.get("envFrom", []):
            if "secretRef" in source and not source["secretRef"].get("optional"):
                yield f"{what}: needs the Secret {source['secretRef']['name']}, which is not here"
            if "configMapRef" in source:
                yield from _config_map(what, source["configMapRef"], [], objects)
        for variable in container.get("env", []):
            if "configMapKeyRef" in variable.get("valueFrom", {}):
                wanted = variable["valueFrom"]["configMapKeyRef"]
                yield from _config_map(what, wanted, [wanted["key"]], objects)


def _config_map(what: str, wanted: Object, keys: list[str], objects: list[Object]) -> Iterator[str]:
    if wanted.get("optional"):
        return
    found = [item for item in objects if item["kind"] == "ConfigMap" and item["metadata"]["name"] == wanted["name"]]
    if not found:
        yield f"{what}: no ConfigMap {wanted['name']} here"
    elif not set(keys) <= set(found[0]["data"]):
        yield f"{what}: ConfigMap {wanted['name']} has not all of {', '.join(keys)}"
