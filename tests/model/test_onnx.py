"""f as an ONNX program is f, for every network and batch size, and says nothing of the machine that wrote it."""

import importlib.util
import sys

import onnxruntime
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from naign.cli import model as cli
from naign.model.files import write_onnx
from naign.model.naign import NAIGN
from tests.model.made import make_model
from tests.refused import refused

SMALL = {
    "conv": ({"name": "conv", "width": 4, "depth": 1, "code": 8}, (1, 8, 8)),
    "spatial": ({"name": "spatial", "width": 8, "depth": 1, "code": 4}, (3, 16, 8)),
    "blended": ({"name": "spatial", "width": 8, "depth": 1, "code": 4, "grid": 32, "blend": True}, (3, 48, 32)),
    "mlp": ({"name": "mlp", "width": 8, "depth": 1, "octaves": 2}, (2,)),
}


@pytest.fixture
def save(tmp_path):
    """Writes a model of one of SMALL, and returns its folder."""

    def save(name):
        settings, shape = SMALL[name]
        model = make_model(settings, shape)
        for value in model.network.parameters():  # some begin as zero
            nn.init.normal_(value, std=0.3)
        model.save_pretrained(tmp_path / "run")
        return f"{tmp_path}/run"

    return save


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_onnx_is_f(save, tmp_path, capsys, name):
    run = save(name)
    cli.export(run, to=tmp_path / "to", format="onnx")
    assert "differs from f by at most" in capsys.readouterr().out
    file = tmp_path / "to/model.onnx"
    session = onnxruntime.InferenceSession(file)
    model = NAIGN.from_pretrained(run)
    for count in (1, 5):
        x = torch.randn(count, *model.shape)
        (found,) = session.run(["projected"], {"x": x.numpy()})
        assert_close(torch.from_numpy(found), model.project(x), rtol=1e-5, atol=1e-5)
    assert b".py" not in file.read_bytes()


def test_a_missing_package_is_named_and_nothing_is_written(save, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx_ir.passes.common", None)
    with refused(r"--format onnx needs onnxscript .*pip install -e '.\[onnx\]'"):
        cli.export(save("mlp"), to=tmp_path / "to", format="onnx")
    assert not (tmp_path / "to").exists()


def test_without_onnxruntime_it_is_not_checked(save, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    cli.export(save("mlp"), to=tmp_path / "to", format="onnx")
    assert "not checked: onnxruntime is not installed" in capsys.readouterr().out


class Branching(nn.Module):
    """What no exporter can follow: its graph depends on its input."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


class Changing(nn.Module):
    """Another function while it is exported."""

    def forward(self, x):
        return x if torch.compiler.is_exporting() else 2 * x


@pytest.mark.parametrize(
    "network, said",
    [
        (Branching(), "torch cannot export this network to ONNX"),
        (Changing(), "in onnxruntime the program differs from f by"),
    ],
)
def test_what_is_not_f_is_not_written(tmp_path, network, said):
    with refused(said):
        write_onnx(network, (2,), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
