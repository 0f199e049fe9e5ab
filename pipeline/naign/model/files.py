"""Files of a model: where they are read from (a run, a checkpoint, a folder, a bucket, the hub or models/ of this
package), and how they are written, as safetensors. No pickle is ever read.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants  # all else where it is used: it takes 0.1 s, and trainings rarely need it
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from naign import shipped
from naign.checkpoint.bucket import fetch_file, newest_first
from naign.checkpoint.writer import is_complete
from naign.errors import Damaged, InputError, Unavailable, check_address, one_line
from naign.storage.store import is_in_bucket, open_store

log = logging.getLogger("naign.model")

WEIGHTS = "model.safetensors"
FILES = ("ema.safetensors", WEIGHTS)  # the weights of a checkpoint are in the first of these that it has
PREFIX = "hf://"  # of the names of models on the hub
LOGIN = "(`hf auth login`, or HF_TOKEN)"

_KEY = "naign"  # in the safetensors header: a JSON object that describes the model
_STATES = ("prior.", "latents.", "bank.")  # begin the names of their tensors
_FORMER = "prior.phase"  # of flows of earlier versions


@contextmanager
def open_weights(place: str | Path, **options: Any) -> Iterator[tuple[Path, str]]:
    """The file with the weights of `place`, as NAIGN.from_pretrained chooses it, and of a run the checkpoint's name.

    Of a bucket that one file is fetched, and is temporary. `options` are those of `download`. Raises InputError if
    there is none.
    """
    address = str(place)
    check_address(address)
    named = shipped_model(place)
    if named:
        yield named, ""
    elif address.startswith(PREFIX):
        yield download(address.removeprefix(PREFIX), **options), ""
    elif is_in_bucket(address):
        open_store(address)  # raises InputError for what is no address
        run = address.rstrip("/")
        with tempfile.TemporaryDirectory() as folder:
            found = _find_in_run(run, lambda name: fetch_file(run, name, FILES, Path(folder)))
            if found is None:
                raise InputError(f"{run} holds no complete checkpoint: has the training written one yet?")
            yield found
    else:
        yield _find_locally(Path(place))


def shipped_model(place: str | Path) -> Path | None:
    """The weights of the model in models/ of that name; None where there is none, and where a path has that name."""
    name = str(place)
    file = shipped("models") / name / WEIGHTS
    if name != Path(name).name or os.path.lexists(name) or not os.path.isfile(file):
        return None
    return file


def _find_locally(place: Path) -> tuple[Path, str]:
    """As `open_weights`, of a file, a run, a checkpoint or an exported folder on this machine."""
    if os.path.isfile(place):  # unlike Path.is_file, False for what no file can be called
        return place, ""
    if not os.path.isdir(place):
        missing = f"no run or model at '{place}': there is no {os.path.abspath(place)}"
        elsewhere = "a model of the Hugging Face hub is hf://user/model, a run in a bucket s3://bucket/prefix"
        raise InputError(f"{missing}; {elsewhere}, the one that comes with naign mnist")

    def take(name: str) -> Path:
        checkpoint = place / "checkpoints" / name
        if not is_complete(checkpoint):
            raise Damaged(f"{checkpoint} is damaged or incomplete")
        return _first_file(checkpoint)

    return _find_in_run(str(place.absolute()), take) or (_first_file(place), "")


def _first_file(folder: Path) -> Path:
    """The first of FILES in a checkpoint or an exported folder."""
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"'{folder}' has no complete checkpoint and no {WEIGHTS}: has its training got that far?")


def _find_in_run(run: str, take: Callable[[str], Path]) -> tuple[Path, str] | None:
    """The weights and the name of a run's newest undamaged checkpoint; None if it has no checkpoint.

    `run` is a folder or a bucket; `take` returns the weights of the checkpoint of a name, or raises Damaged.
    """
    damaged = False
    for name in newest_first(run):
        try:
            return take(name), name
        except Damaged as error:
            damaged = True
            log.warning("skipped: %s", one_line(error))
    if damaged:
        raise InputError(f"all checkpoints of '{run}' are damaged or incomplete: copy one again, or train anew")
    return None


def read_tensors(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors, in float32, of a safetensors file.

    Raises InputError for a file that cannot be read, and for values that are not finite.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is no readable safetensors file ({error}); is it truncated?") from None
    for name, value in tensors.items():
        if value.is_floating_point():
            tensors[name] = value.float()
        elif value.is_complex():
            raise InputError(f"{file} holds complex numbers: the weights of a model are real")
    if not all_finite(tensors):
        raise InputError(f"{file} holds weights that are not finite: its training broke down, take an earlier one")
    return metadata, tensors


def read_model(file: Path) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """The JSON that describes a model, its weights, and the state of prior, latents and bank.

    Raises InputError as `read_tensors`, and for a file that this program did not write.
    """
    metadata, tensors = read_tensors(file)
    if _KEY not in metadata:
        raise InputError(f"{file} has no '{_KEY}' entry in its header: it was not written by this program")
    weights = {}
    state = {}
    for name, value in tensors.items():
        if not name.startswith(_STATES):
            weights[name] = value
        elif not name.startswith(_FORMER):
            state[name] = value
    return metadata[_KEY], weights, state


def save_model(
    file: Path,
    weights: Mapping[str, Tensor],
    metadata: dict[str, Any],
    state: Mapping[str, Tensor],  # of prior, latents and bank, as NAIGN.state
) -> None:
    """Write one safetensors file, in float32, or in float16 if metadata["dtype"] says so. `metadata` names the kinds of
    the network, the latents and the prior.
    """
    dtype = torch.float32
    if metadata.get("dtype") == "float16":
        dtype = torch.float16
    tensors = {}
    for name, value in {**weights, **state}.items():
        value = value.detach().cpu()
        if value.is_floating_point():  # unlike counters and masks
            value = value.to(dtype)
        tensors[name] = value.contiguous()
    if dtype == torch.float16 and not all_finite(tensors):
        raise InputError("the model has weights beyond 65504, which float16 does not hold: store it as float32")
    save_file(tensors, file, metadata={_KEY: json.dumps(metadata, sort_keys=True)})


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether no value of the tensors is NaN or infinite."""
    return all(value.isfinite().all() for value in tensors.values())


def download(name: str, **options: Any) -> Path:
    """The weights of user/model on the hub or in its cache; `options` are hf_hub_download's. Raises InputError, or
    Unavailable where the hub does not answer.
    """
    from huggingface_hub import errors, get_token, hf_hub_download

    tokens = f"{options.get('token')}{get_token()}"
    if not (tokens.isascii() and tokens.isprintable()):  # a message of the HTTP library could show them
        raise InputError(f"the token for the hub has characters that no token has: renew the login {LOGIN}")
    try:
        return Path(hf_hub_download(name, WEIGHTS, **options))
    except Exception as error:  # the hub's, the HTTP library's, the file system's
        reason = f"{type(error).__name__}: {one_line(error)}"
        unreached = isinstance(error, errors.LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE
    hint = f"a private model needs a login {LOGIN}, and only {WEIGHTS} is read, never a pickle"
    kind = Unavailable if unreached else InputError
    raise kind(f"no model at {PREFIX}{name} ({one_line(constants.ENDPOINT)}): {reason}; {hint}")
