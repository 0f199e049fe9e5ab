"""f as an ONNX program is f, for every network and batch size, and says nothing of the machine that wrote it."""

import importlib.util
from dataclasses import dataclass

import onnxruntime
import pytest
import torch
from torch import nn

from naign.cli import model as cli
from naign.errors import InputError
from naign.model import programs
from naign.model.naign import NAIGN
from naign.model.networks import NETWORKS, build_network, find_network

SMALL = {
    "conv": ({"width": 4, "depth": 1, "code": 8}, (1, 8, 8)),
    "spatial": ({"width": 8, "depth": 1, "code": 4}, (3, 16, 8)),
    "blended": ({"name": "spatial", "width": 8, "depth": 1, "code": 4, "grid": 32, "blend": True}, (3, 48, 32)),
    "mlp": ({"width": 8, "depth": 1, "octaves": 2}, (2,)),
}


def save(folder, name):
    settings, shape = {"name": name} | SMALL[name][0], SMALL[name][1]
    torch.manual_seed(0)
    network = build_network(find_network(settings["name"])[0](**settings), shape)
    for value in network.parameters():  # some begin as zero
        nn.init.normal_(value, std=0.3)
    metadata = {"model": settings, "shape": list(shape), "prior": {"name": "gaussian"}}
    NAIGN(network, metadata).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*NETWORKS, *SMALL}))
def test_onnx_is_f(tmp_path, capsys, name):
    run, file = save(tmp_path / "run", name), tmp_path / "to/model.onnx"
    cli.export(run, to=tmp_path / "to", format="onnx")
    assert "differs from f by at most" in capsys.readouterr().out
    session, model = onnxruntime.InferenceSession(file), NAIGN.from_pretrained(run)
    for count in (1, 5):
        x = torch.randn(count, *model.shape)
        (found,) = session.run(["projected"], {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model.project(x), rtol=1e-5, atol=1e-5)
    assert b".py" not in file.read_bytes()


@pytest.mark.parametrize("chosen", [{"prior": "gmm"}, {"guidance": 1.0}, {"steps": 4}])
def test_what_chooses_a_prior_is_refused(tmp_path, chosen):
    with pytest.raises(InputError, match="onnx is f alone: leave out what chooses its prior"):
        cli.export("run", to=tmp_path / "to", format="onnx", latents=cli.Latents(**chosen))


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_and_nothing_is_written(tmp_path, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(InputError, match=rf"--format onnx needs {missing}: in a checkout, pip install -e '.\[onnx\]'"):
        cli.export(save(tmp_path / "run", "mlp"), to=tmp_path / "to", format="onnx")
    assert not (tmp_path / "to").exists()


def test_without_onnxruntime_it_is_not_checked(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    cli.export(save(tmp_path / "run", "mlp"), to=tmp_path / "to", format="onnx")
    assert "not checked: onnxruntime is not installed" in capsys.readouterr().out


@dataclass(eq=False)
class Branching(nn.Module):
    """What no exporter can follow: its graph depends on its input."""

    def __post_init__(self):
        super().__init__()

    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_network_that_cannot_be_exported_says_so(tmp_path):
    with pytest.raises(InputError, match="torch cannot export this network to ONNX"):
        programs.write_onnx(Branching(), (2,), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Changing(nn.Module):
    """Another function while it is exported."""

    def forward(self, x):
        return x if torch.compiler.is_exporting() else 2 * x


def test_a_program_that_differs_is_not_written(tmp_path):
    with pytest.raises(InputError, match="in onnxruntime the program differs from f by"):
        programs.write_onnx(Changing(), (2,), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
