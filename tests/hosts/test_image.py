"""The image that launch/Dockerfile builds, where buildah or docker is here and BASE names a base image that is here.

BUILD_ARGUMENTS are further arguments of the build, as `--build-arg TORCH_INDEX=...`.
"""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

BUILDER = next((name for name in ("buildah", "docker") if shutil.which(name)), "")
BASE, MORE = os.environ.get("BASE", ""), shlex.split(os.environ.get("BUILD_ARGUMENTS", ""))
NAME = "localhost/naign-test:cpu"

LOOK = """
import importlib.util, json, os, sys
import boto3, torch
import naign.cli.main
boto3.client("s3", region_name="us-east-1"), boto3.client("sts", region_name="us-east-1")
print(json.dumps({
    "user": os.getuid(),
    "sbom": json.load(open("/opt/naign/sbom.cdx.json")),
    "left": [name for name in ("pip", "setuptools") if importlib.util.find_spec(name)],
    "headers": os.path.exists(os.path.dirname(torch.__file__) + "/include"),
    "code": naign.__file__,
}))
"""


def call(*command: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def build(context: Path) -> list[str]:
    """Build the image. Returns its layers, the lowest first."""
    verb = ("bud", "--layers") if BUILDER == "buildah" else ("build",)
    options = ("--build-arg", f"BASE={BASE}", "--target", "cpu", "-t", NAME, "-f", str(context / "launch/Dockerfile"))
    call(
        BUILDER,
        *verb,
        *options,
        *MORE,
        str(context),
    )
    if BUILDER == "docker":
        layers: list[str] = json.loads(call("docker", "inspect", NAME))[0]["RootFS"]["Layers"]
    else:
        layers = json.loads(
            call(
                "buildah",
                "inspect",
                "--type",
                "image",
                NAME,
            )
        )["OCIv1"]["rootfs"]["diff_ids"]
    return layers


def run(*command: str) -> str:
    """What a command prints in a container of the image."""
    if BUILDER == "docker":
        return call(
            "docker",
            "run",
            "--rm",
            "--entrypoint",
            command[0],
            NAME,
            *command[1:],
        )
    container = call("buildah", "from", NAME).strip()
    try:
        return call(
            "buildah",
            "run",
            container,
            "--",
            *command,
        )
    finally:
        call("buildah", "rm", container)


@pytest.mark.slow
@pytest.mark.timeout(6000)
@pytest.mark.skipif(not (BUILDER and BASE), reason="no buildah or docker here, or no BASE in the environment")
def test_the_image_has_what_a_run_needs_and_a_change_of_code_is_its_last_layer(tmp_path):
    for name in ("pipeline", "configs", "launch", "k8s", "models"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("pyproject.toml", "LICENSE", ".dockerignore"):
        shutil.copy(ROOT / name, tmp_path)
    before = build(tmp_path)
    found = json.loads(run("python", "-c", LOOK).splitlines()[-1])
    assert found["user"] == 65532 and found["left"] == [] and not found["headers"]
    assert found["code"] == "/app/pipeline/naign/__init__.py"
    assert found["sbom"]["bomFormat"] == "CycloneDX"
    assert {"torch", "numpy", "accelerate", "naign"} <= {part["name"] for part in found["sbom"]["components"]}
    small = ("--data.source=digits", "--data.path=/tmp/digits", "--run.path=/tmp/run", "--train.images=512")
    sizes = (
        "--match.round=256",
        "--match.ratio=2",
        "--model.width=8",
        "--model.code=16",
        "--report.pictures=0",
        "--latents.name=smooth",
    )
    steps = f"/app/launch/entrypoint {shlex.join([*small, *sizes])} && naign evaluate /tmp/run && weed version"
    assert "done: the run lies in /tmp/run" in run("sh", "-c", steps)

    with (tmp_path / "pipeline/naign/errors.py").open("a") as file:
        file.write("# changed\n")
    after = build(tmp_path)
    assert after[:-1] == before[:-1] and after[-1] != before[-1]
