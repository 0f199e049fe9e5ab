"""Models go to the hub and come back by name; folders need no hub; nothing is ever unpickled, no token shown."""

import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from naign.errors import InputError, Unavailable
from naign.model.files import WEIGHTS
from naign.model.naign import NAIGN
from tests.model.made import make_model


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_model()


def push(hub, model, name, *, private=False):
    """Put a model on the hub, as `hf upload` does with an exported folder."""
    model.save_pretrained("shared")
    hub.models[name] = {file.name: file.read_bytes() for file in Path("shared").iterdir()}
    if private:
        hub.private.add(name)


def refused(place, said):
    with pytest.raises(InputError, match=said) as caught:
        NAIGN.from_pretrained(place)
    return str(caught.value)


def test_a_model_comes_back_from_the_hub_also_offline(hub, model, monkeypatch):
    push(hub, model, "me/model", private=True)
    assert set(hub.models["me/model"]) == {WEIGHTS, "config.json"}
    again = NAIGN.from_pretrained("hf://me/model", revision="main")
    assert again.metadata == model.metadata
    assert torch.equal(again.sample(3), model.sample(3))
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(NAIGN.from_pretrained("hf://me/model").sample(3), model.sample(3))
    refused("hf://me/other", "no model at hf://me/other .*LocalEntryNotFoundError")
    assert len(hub.requests) == asked


def test_the_hub_is_asked_only_for_names_of_the_hub(hub, model):
    """A mistyped folder must not open the model of a stranger."""
    hub.models["me/other"] = {}
    for place in ("me/other", "me/a/b"):
        refused(place, f"no run or model at '{place}': there is no /.*; a model .* is hf://user")
    refused("hf://me/../x", "no model at hf://me/../x .*HFValidationError")
    assert not hub.requests
    model.save_pretrained("me/model")
    assert torch.equal(NAIGN.from_pretrained("me/model").sample(3), model.sample(3))


class Opened:
    def __reduce__(self):
        return open, ("opened", "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_never_read(hub, model, name):
    content = pickle.dumps(Opened())
    hub.models["me/pickle"] = {name: content, "config.json": b"[]"}
    refused("hf://me/pickle", "hf://me/pickle .*EntryNotFoundError.* only model.safetensors is read, never a pickle")
    assert not any(name in request for request in hub.requests)
    folder = Path("folder")
    folder.mkdir()
    (folder / name).write_bytes(content)
    refused(folder, "no model.safetensors")
    refused(folder / name, "no readable safetensors")
    assert not Path("opened").exists()


def test_what_the_hub_does_not_have_or_show_is_no_model(hub, model, monkeypatch):
    push(hub, model, "me/hidden", private=True)
    hub.models["me/cut"] = {WEIGHTS: hub.models["me/hidden"][WEIGHTS][:-9]}
    monkeypatch.delenv("HF_TOKEN")
    for name in ("none", "hidden"):
        refused(f"hf://me/{name}", "no model at hf://me/.*RepositoryNotFoundError.*a private model needs a login")
    refused("hf://me/cut", "no readable safetensors file")


def test_no_message_of_a_download_shows_a_secret(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_\x07secret")
    refused("hf://me/model", "has characters that no token has")
    address = "http://me:hidden@127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the attempts of the hub's library
    with pytest.raises(Unavailable, match="no model at hf://me/model .*LocalEntryNotFoundError") as caught:
        NAIGN.from_pretrained("hf://me/model")  # nobody answers there, which a retry may mend
    assert "hidden" not in str(caught.value)
    assert hub.token not in str(caught.value)


def test_a_hub_that_answers_in_another_form_is_told_in_one_sentence(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: {}["etag"])
    refused("hf://me/model", "no model at hf://me/model .* KeyError: 'etag'")
