"""Encoders made elsewhere, behind one interface: networks of timm, TorchScript files and exported programs.

No pickle is ever opened. TorchScript has its own interpreter. An exported program (.pt2) is Python to torch, which
would unpickle parts of it and resolve any name in it: `_check_program` refuses all that a plain program does not need.
"""

import json
import math
import os
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import InputError, one_line, printable

PIXELS = {"cpu": 2**17, "cuda": 2**22}  # seen at once; in a CPU's cache: lite2 is 2.5 times as fast as on 2**20
REMEDY = "save the module with torch.jit.save (.ts) or torch.export.save (.pt2)"

NAME = r"[\w.]*"
TARGET = r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|torch\.sym_(max|min|not)"
TARGET += r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge)"
WORDS = "Symbol|positive|integer|nonnegative|True|False|Integer|Mul|Add|Pow|Max|Min|FloorDiv|CleanDiv|Mod|PythonMod"
ALLOWED = {
    "target": TARGET,
    "expr_str": rf"({WORDS}|'?[su]\d+'?|\d|[\s()+\-*/,=<>])*+",  # evaluated as Python by sympy
    "as_string": r"[\w .,\->]*",
    "path_name": r"(weight|tensor)_\d+",
    "use_pickle": "False",
    "torch_version": r"[\w.+]*",
}
SPEC = r'(builtins\.(tuple|list|dict)|type|context|children_spec|null|\d|[\s{}\[\]":,]|\\"\w+\\")*+'
ALLOWED |= {"in_spec": SPEC, "out_spec": SPEC}
"""What the strings of an exported program may be, by the key they stand under; all others are names."""
UNUSED = {"metadata", "guards_code"}  # traces of the source; guards, which are not compiled


class Foreign(nn.Module):
    """A frozen network of others, for images in [-1, 1].

    It gives a tensor or a list of them: maps (n, c, h, w) of several stages, the last of which may be features (n, d).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        channels: int = 0,  # it reads; 0: those of the data, whatever they are
        smallest: int = 1,  # height or width of images, in pixels, that it makes sense for
        side: int = 0,  # smaller images are enlarged to that height or width
        exact: bool = False,  # larger ones are reduced to it, too
        mean: list[float] | None = None,  # by channel, in the scale of [-1, 1]
        std: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.channels, self.smallest, self.side, self.exact = network, channels, smallest, side, exact
        for weight in network.parameters():  # a script has no requires_grad_ of its own
            weight.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean or [0.0]).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std or [1.0]).view(1, -1, 1, 1))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which images of that size are seen."""
        if self.exact:
            return self.side, self.side
        factor = max(1.0, self.side / min(height, width))
        return round(height * factor), round(width * factor)

    def forward(self, images: Tensor) -> list[Tensor]:
        """What the network gives, as a list."""
        height, width = images.shape[2:]
        if self.channels > 1 == images.shape[1]:
            images = images.expand(-1, self.channels, -1, -1)
        if (size := self.size(height, width)) != (height, width):
            images = F.interpolate(images, size, mode="bilinear", antialias=size[0] < height)
        images = (images - self.mean) / self.std
        most = max(1, PIXELS.get(images.device.type, 2**20) // (size[0] * size[1]))
        found = [self.network(part) for part in images.split(most)]
        if isinstance(found[0], Tensor):
            return [torch.cat(found)]
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def stages(self, images: Tensor) -> list[Tensor]:
        """(n, C, H, W) in [-1, 1] -> maps of features (n, c, h, w), fine ones first."""
        return [maps for maps in self(images) if maps.ndim == 4]

    def features(self, images: Tensor) -> Tensor:
        """(n, C, H, W) in [-1, 1] -> (n, d) float32."""
        last: Tensor = self(images)[-1].float()
        return last.mean((2, 3)) if last.ndim == 4 else last

    def unfit(self, shape: tuple[int, ...]) -> str:
        """Why images of that shape cannot be read, '' if they can. It is tried."""
        if len(shape) != 3:
            return f"reads images, these are points of shape {shape}"
        if self.channels and shape[0] not in (1, self.channels):
            return f"reads images of {self.channels} channels, or of 1, which is repeated; these have {shape[0]}"
        if min(shape[1:]) < self.smallest:
            least = f"{self.smallest}x{self.smallest}"
            return f"takes images of at least {least} pixels, these are {shape[1]}x{shape[2]}: too small"
        try:
            with torch.no_grad():
                values = torch.linspace(-1, 1, 3 * math.prod(shape), device=self.mean.device).view(3, *shape)
                found = [self.features(values[:n]) for n in (1, 2, 3)]
        except Exception as error:  # whatever a network of others may raise
            what = one_line(error)
            return f"cannot read images of shape {shape} in batches of any size ({type(error).__name__}: {what})"
        for n, features in enumerate(found, start=1):
            if features.ndim != 2 or len(features) != n or not features.shape[1]:
                said = "it must give (n, d), maps (n, c, h, w), or a list that ends so"
                return f"gives {tuple(features.shape)} for {n} image{'s'[: n != 1]}: {said}"
        return "" if all(bool(features.isfinite().all()) for features in found) else "gives values that are not finite"


class Staged(nn.Module):
    """A network of timm that gives its intermediate maps and, last, its features before the classifier."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        last, maps = self.network.forward_intermediates(images)
        return [*maps, self.network.forward_head(last, pre_logits=True)]


def open_timm(name: str) -> Foreign:
    """`NAME` of timm with weights of its hub, or `NAME@FILE.safetensors`; InputError where one is missing."""
    kind, _, file = name.partition("@")
    try:
        import timm
    except ImportError as error:
        raise InputError(f"encoder 'timm:{name}' needs timm ({error}): pip install timm") from None
    if file and not (file.endswith(".safetensors") and os.path.isfile(file)):
        raise InputError(f"encoder 'timm:{name}': {file} is no safetensors file that is there")
    try:
        overlay = {"pretrained_cfg_overlay": {"file": file}} if file else {}
        network = timm.create_model(kind, pretrained=True, **overlay)
    except Exception as error:  # unknown names, the hub's, the file's
        what = one_line(error)
        remedy = "see timm.list_models(); without network access give its weights as timm:NAME@FILE.safetensors"
        raise InputError(f"encoder 'timm:{name}' cannot be opened ({type(error).__name__}: {what}): {remedy}") from None
    if not hasattr(network, "forward_intermediates"):
        raise InputError(f"encoder 'timm:{name}' has no forward_intermediates in this timm: choose another")
    settings = network.pretrained_cfg
    channels, height, _ = settings["input_size"]
    exact = bool(settings.get("fixed_input_size"))
    scale = {"mean": [2 * value - 1 for value in settings["mean"]], "std": [2 * value for value in settings["std"]]}
    side = height if exact else min(64, height)
    return Foreign(Staged(network.eval()), channels=channels, smallest=16, side=side, exact=exact, **scale)


class Inception(nn.Module):
    """torch-fidelity's Inception network: pixels 0 ... 255 -> the 2,048 features of the FID."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images.round().clamp(0, 255).to(torch.uint8))[0]
        return features


def open_inception() -> Foreign:
    """The network of the FID, from torch-fidelity; InputError where the package or its weights are missing."""
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as source
    except ImportError as error:
        raise InputError(
            f"encoder 'fid-inception' needs torch-fidelity ({error}): pip install torch-fidelity"
        ) from None
    url = source.URL_INCEPTION_V3
    try:  # the package unpickles what is then in the cache: only what is known to hold nothing but tensors
        torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True)
        network = source.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except Exception as error:  # the network's, the file's
        cache, what = f"{torch.hub.get_dir()}/checkpoints", f"{type(error).__name__}: {one_line(error)}"
        remedy = f"without network access put the file of {url} into {cache}"
        raise InputError(f"the weights of encoder 'fid-inception' cannot be had ({what}): {remedy}") from None
    return Foreign(Inception(network), channels=3, mean=[-1.0], std=[1 / 127.5])


def open_file(path: str) -> Foreign:
    """The module in a TorchScript (.ts, .torchscript) or torch.export (.pt2) file, without enlarging or scaling.

    It gets images in [-1, 1] at the data's size and channels. InputError for a pickle, and for other files.
    """
    if not os.path.isfile(path):  # False also for what no file could be called
        raise InputError(f"no encoder in {path}: there is no such file")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is a pickle or something else that is not opened: {REMEDY}")
    exported = path.endswith(".pt2")
    try:
        with zipfile.ZipFile(path) as archive:
            inside = {name.partition("/")[2] for name in archive.namelist()}
            if not ({"archive_format"} if exported else {"constants.pkl", "version"}) <= inside:
                kind = "a pickle" if "data.pkl" in inside else "another archive"
                raise InputError(f"{path} is {kind}, which is not opened: {REMEDY}")
            entries = [entry.lower() for entry in archive.namelist()]  # torch finds them whatever their case
            if len(set(entries)) < len(entries):  # one might be checked and the other read
                raise InputError(f"{path} is not used, since it holds two entries of one name")
            (_check_program if exported else _check_script)(archive)
        if exported:
            network = torch.export.load(path).module(check_guards=False)
        else:
            network = torch.jit.load(path, map_location="cpu").eval()
    except InputError:
        raise
    except Exception as error:  # whatever torch makes of the file
        what = one_line(error)
        raise InputError(f"{path} cannot be opened ({type(error).__name__}: {what}): {REMEDY}") from None
    return Foreign(network)


def _check_script(archive: zipfile.ZipFile) -> None:
    """InputError for a script that would run while it is opened, or that reads or writes files."""
    for entry in archive.namelist():
        if entry.lower().endswith(".py"):
            code = archive.read(entry).decode(errors="replace")
            if found := re.search(r"__[gs]etstate__|\b(torch|ops\.aten)\.(save|from_file)\b", code):
                why = "runs while it is opened" if "state" in found[0] else "reads or writes files"
                raise InputError(f"{archive.filename} has {found[0]}, which {why} and no encoder needs: it is not used")


def _check_program(archive: zipfile.ZipFile) -> None:
    """InputError for a program that holds pickles, or calls or names anything but tensor operations."""
    refused = f"{archive.filename} is not used, since an encoder needs tensors and tensor operations only; it holds"
    for entry in archive.namelist():
        name = entry.partition("/")[2]
        if name.startswith("data/sample_inputs/"):
            with archive.open(entry) as file:
                torch.load(file, weights_only=True)  # raises where torch.export.load would go on and unpickle
        elif name.endswith(".json"):
            for key, text in _strings(json.loads(archive.read(entry))):
                if not re.fullmatch(ALLOWED.get(key, NAME), text):
                    raise InputError(f"{refused} {key} {printable(text, 100)!r}")
        elif not re.fullmatch(r"data/(weights/weight|constants/tensor)_\d+|\w+|\.data/\w+", name):
            raise InputError(f"{refused} {printable(name)!r}")


def _strings(tree: Any, key: str = "name") -> Iterator[tuple[str, str]]:
    """The strings of a JSON tree with the keys they stand under; the keys themselves are names."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield "name", name
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [None]
            if name == "use_pickle":
                yield name, str(value)
            elif not (name in UNUSED and all(isinstance(part, str) for part in parts)):
                yield from _strings(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(value, key)
    elif isinstance(tree, str):
        yield key, tree
