"""A model from elsewhere chooses no S3 server; a run keeps the one that it was trained from."""

import os

import pytest

from pipeline.errors import InputError
from pipeline.evaluate.recorded import recorded
from pipeline.model.naign import NAIGN
from pipeline.model.networks import PointConfig, build_network

THERE = "http://there:9000"


@pytest.fixture
def asked(monkeypatch):
    """The servers that data were asked from."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://own:9000")
    found = []

    def open_manifest(config):
        found.append(os.environ["AWS_ENDPOINT_URL_S3"])
        raise InputError("nothing there")

    monkeypatch.setattr("pipeline.evaluate.recorded.open_manifest", open_manifest)
    return found


@pytest.fixture
def model():
    section = {"path": "s3://bucket/data", "endpoint": THERE}
    metadata = {"shape": [2], "latents": "gaussian", "config": {"data": section}}
    return NAIGN(build_network(PointConfig(width=8), (2,)), metadata)


@pytest.mark.parametrize("place", ["exported", "user/model"])
def test_a_model_from_elsewhere_chooses_no_server(model, asked, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exported").mkdir()
    with pytest.raises(InputError, match=f"names the server {THERE} for its data: set AWS_ENDPOINT_URL to it if you"):
        recorded(model, place, None)
    assert not asked
    with pytest.raises(InputError, match="nothing there"):
        recorded(model, place, "s3://mine/data")
    assert asked == ["http://own:9000"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", THERE)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", THERE)
    with pytest.raises(InputError, match="nothing there"):
        recorded(model, place, None)
    assert asked[1:] == [THERE]


@pytest.mark.parametrize("place", ["run", "run/checkpoints/step-00000001", "s3://bucket/run"])
def test_a_run_keeps_its_server(model, asked, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-00000001/manifest.json").touch()
    for data in (None, "s3://mine/data"):
        with pytest.raises(InputError, match="nothing there"):
            recorded(model, place, data)
    assert asked == [THERE, THERE]
