"""The package that docs/extend.md shows is one: what it adds is packed, trained with, resumed and evaluated."""

import re
import shlex
import sys
import tomllib

import pytest

from tests.conftest import PYTHONPATH, ROOT, SMALL, direct_command, forked
from tests.e2e.runs import losses, metrics_of
from tests.programs import execute, install

TEXT = (ROOT / "docs/extend.md").read_text()
BLOCK = re.compile(r"^```(?:python|toml)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A file: a block of code whose first line is a comment with its name."""
LOAD = """
from naign.model.naign import NAIGN
model = NAIGN.from_pretrained("runs/inverted")
print(model.metadata["model"], model.metadata["prior"])
print(tuple(model.sample(5).shape), "learned" if model.prior.factor.any(1).all() else "as it began")
"""


ENCODER = """
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from naign.model.encoders import Encoder

class Coarse(nn.Module):
    def features(self, images):
        return adaptive_avg_pool2d(images, 4).flatten(1)

def coarse():
    return Encoder(name="coarse", network=Coarse())
"""
EXPECTED = (
    "{'hidden': 128, 'init': '', 'name': 'dense'} {'directions': 6, 'images': 512, 'name': 'principal'}\n"
    "(5, 1, 8, 8) learned"
)


@pytest.fixture
def site(tmp_path):
    """The path with the package as an installer leaves it."""
    files = dict(BLOCK.findall(TEXT))
    files["my_naign/encoder.py"] = ENCODER
    lines = ["[naign.encoders]", "coarse = my_naign.encoder:coarse"]
    for group, points in tomllib.loads(files.pop("pyproject.toml"))["project"]["entry-points"].items():
        lines.append(f"[{group}]")
        lines += [f"{name} = {value}" for name, value in points.items()]
    files["my_package-1.dist-info/entry_points.txt"] = "\n".join(lines)
    return install(tmp_path, files)


@pytest.mark.slow
def test_the_package_of_the_page_is_packed_trained_with_and_evaluated(site, tmp_path):
    def run(*command, code=0, path=site):
        done = execute(command, tmp_path, env=forked(PYTHONPATH=path))
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    def naign(line, *more):
        return run(sys.executable, "-m", "naign.cli", *line.split(), *more)

    shown = TEXT.partition("\nnaign train ")[2].partition("naign evaluate")[0]
    options = [option for option in shlex.split(shown) if option != "\n"]
    options += [option for option in SMALL if not option.startswith(("--model", "--prior", "--objective"))]
    options += ["--prior.images=512", "--train.callbacks=note"]
    naign("pack inverted --to data/inverted")
    naign("train", *options, "--train.images=512")
    # A resumed run reads what the first one recorded of the package's settings.
    refused = run(*direct_command(*options, "--objective.delta=0.3", "--prior.directions=7"), code=2)
    assert "objective.delta: 0.2 there, 0.3 now" in refused
    assert "prior.directions: 6 there, 7 now" in refused
    text = run(*direct_command(*options, "--train.images=768", "--resume=changed"))
    assert "resuming from" in text
    rounds = losses(tmp_path / "runs/inverted")
    assert len(rounds) == 3
    assert "step-" in (tmp_path / "runs/inverted/copied.txt").read_text()
    assert {"loss/total", "loss/reconstruction", "loss/imle"} <= rounds[-1].keys()
    assert run(sys.executable, "-c", LOAD).strip() == EXPECTED
    naign("evaluate runs/inverted --encoder coarse --samples 100")
    metrics = metrics_of(tmp_path / "runs/inverted")
    assert metrics["encoder"] == "pixels"
    assert metrics["second"]["encoder"] == "coarse"
    assert metrics["images_seen"] == 768

    # Without the package its names are unknown, and with it wrong settings of theirs are.
    gone = run(*direct_command(*options), code=2, path=PYTHONPATH)
    assert "model.name is 'dense': choose one of conv, spatial, mlp" in gone
    assert "--model.hidden" in run(*direct_command(*options, "--model.hiden=3"), code=2)
    assert "prior.directions is 65" in run(*direct_command(*options, "--prior.directions=65"), code=2)
    assert "model.hidden is 0" in run(*direct_command(*options, "--model.hidden=0"), code=2)
