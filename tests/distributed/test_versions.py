"""Which versions of torch, Accelerate and DeepSpeed are supported, and what is said of others."""

import re
import tomllib

import pytest
import torch.distributed.distributed_c10d as c10d

from naign.distributed import host
from naign.distributed.connect import build_accelerator
from naign.errors import InputError
from tests.conftest import ROOT


@pytest.mark.parametrize("library", host.INTERNALS)
def test_the_installed_versions_have_what_is_used(library, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    host.check_versions(library)


def test_a_version_without_an_internal_is_refused_at_the_start(monkeypatch):
    monkeypatch.delattr(c10d, "_get_default_store")
    with pytest.raises(InputError, match=r"^torch \d\S* has no \S*_get_default_store;.*pip install 'torch>=") as caught:
        build_accelerator()
    assert host.TESTED["torch"] in str(caught.value)


def test_the_lowest_tested_versions_are_those_of_the_project_and_of_make_test_lowest():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["deepspeed"]]
    lowest = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "launch/constraints-lowest.txt").read_text(), re.M))
    for library in ("accelerate", "deepspeed"):
        tested = host.TESTED[library]
        (bound,) = [item for item in wanted if re.match(rf"{library}[>=<]", item)]
        least = tested.partition(",")[0].removeprefix(">=")
        assert f">={least}," in bound and lowest[library] == f"{least}.0"
