"""A trained model as its users hold it: sample, project, energy, from one safetensors file."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from naign.data.damage import known_mean
from naign.data.format.labels import parse_number
from naign.errors import InputError, one_line, printable, require, unwritten
from naign.model import hub
from naign.model.holes import put_back
from naign.model.networks import build_network, recorded_network
from naign.model.prior import CodesPrior, Latents, build_latents, build_prior, find_latents, find_prior
from naign.model.prior.flow import KEPT
from naign.model.tiles import PIXELS, Read, blended
from naign.model.weights import locate
from naign.philox import SAMPLES
from naign.settings.constraints import check_fields

_KEY = "naign"  # in the safetensors header: a JSON object that describes the model
_STATE = "prior."  # begins the names of the tensors of the prior
_NOISE = "latents."  # and of those of the latents

FILLING = 8  # applications of f that fill a hole

Advance = Callable[[int], object] | None
"""Called with the number of rows that were just computed."""


class NAIGN:
    """An idempotent generative network f and the prior of its latents.

        model = NAIGN.from_pretrained("runs/mnist")
        samples, repaired, energy = model.sample(16), model.project(images), model.energy(images)

    Images are float32 in [-1, 1], NCHW; points are (n, D) float32. `metadata` says where the model comes from.
    """

    def __init__(self, network: nn.Module, metadata: dict[str, Any], state: Mapping[str, Tensor] | None = None) -> None:
        self.network = network.eval().requires_grad_(False)
        self.metadata = metadata
        self.shape: tuple[int, ...] = tuple(metadata["shape"])
        self.checkpoint = ""  # of a run: its name
        state = state or {}
        self.latents = self._build_latents({key: value for key, value in state.items() if key.startswith(_NOISE)})
        settings = _read_settings("prior", find_prior(metadata["prior"]["name"])[0], metadata["prior"])
        with torch.device("meta"):  # what the settings claim is checked against `state` before it is allocated
            self.prior = build_prior(settings, self.shape, network, labels=metadata.get("labels", ()))
        drawn = {key.removeprefix(_STATE): value for key, value in state.items() if key.startswith(_STATE)}
        self.prior.load_state_dict(drawn, assign=True)
        self._place(self.device)

    def _build_latents(self, state: Mapping[str, Tensor]) -> Latents:
        record = self.metadata.get("latents", {"name": "gaussian"})
        settings = _read_settings("latents", find_latents(record["name"])[0], record)
        with torch.device("meta"):
            latents = build_latents(settings, self.shape)
        latents.load_state_dict({key.removeprefix(_NOISE): value for key, value in state.items()}, assign=True)
        return latents

    @property
    def state(self) -> dict[str, Tensor]:
        """The state of latents and prior, which with `network` and `metadata` makes the same model."""
        noise = {_NOISE + key: value for key, value in self.latents.state_dict().items()}
        return noise | {_STATE + key: value for key, value in self.prior.state_dict().items()}

    @property
    def fitted(self) -> bool:
        """Whether the prior, if there is one, is fitted: a run that was stopped may have a model before that."""
        return not self.prior.learns or self.metadata.get("fitted", 1.0) >= 1

    @property
    def has_prior(self) -> bool:
        """Whether samples are drawn from a prior, rather than from noise."""
        return bool(self.metadata["prior"]["name"] != "none")

    @classmethod
    def from_pretrained(cls, place: str | Path, device: torch.device | str = "cpu", **download: Any) -> "NAIGN":
        """The model of an exported folder or its file, a checkpoint, a run (also s3://), hf://user/model on the hub, or
        the name of one that comes with this package ("mnist"), which is looked up only where no path has it.

        Of a run it is the newest complete checkpoint (`checkpoint`); of a checkpoint
        the moving average of the weights, if it has one. `download`, for the hub alone, are
        keywords of huggingface_hub.hf_hub_download: revision, token, cache_dir, ...
        Raises InputError where there is no model, or the file was not written by this program.
        """
        with locate(place, **download) as weights:
            model = cls._read(weights.file, device)
        model.checkpoint = weights.checkpoint
        return model

    @classmethod
    def _read(cls, file: Path, device: torch.device | str) -> "NAIGN":
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                header = (opened.metadata() or {}).get(_KEY, "")
                tensors = {name: _float32(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is no readable safetensors file ({error}); is it truncated?") from None
        require((header, f"{file} has no '{_KEY}' entry in its header: it was not written by this program"))
        state = {name: tensors.pop(name) for name in list(tensors) if name.startswith((_STATE, _NOISE))}
        try:
            metadata = json.loads(header)
            build = partial(build_network, recorded_network(metadata["model"]), tuple(metadata["shape"]))
            with torch.device("meta"):  # what the header claims is checked against the file before it is allocated
                network = build()
            network.load_state_dict(tensors, assign=True)
            if any(value.is_meta for value in network.buffers()):  # computed when a network is built, not saved
                with torch.random.fork_rng(devices=[]):
                    network = build()
                network.load_state_dict(tensors)
            model = cls(network, metadata, state)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RuntimeError) as error:
            raise InputError(f"{file} does not hold the model that its header describes: {one_line(error)}") from None
        if not all(bool(torch.isfinite(value).all()) for value in (*tensors.values(), *state.values())):
            raise InputError(f"{file} holds weights that are not finite: its training broke down, take an earlier one")
        model._place(device)
        return model

    def _place(self, device: torch.device | str) -> None:
        """Move to the device; on a CPU to channels-last, where convolutions take about two thirds of the time."""
        for part in (self.network, self.latents, self.prior):
            ours = type(part).__module__.startswith("naign.")  # other networks may view() activations
            layout = torch.channels_last if ours and torch.device(device).type == "cpu" else torch.contiguous_format
            for weight in (value for value in part.to(device).parameters() if value.ndim == 4):
                weight.data = weight.data.contiguous(memory_format=layout)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors, in float16 if `metadata["dtype"]` says so and else in float32, and, for readers,
        config.json with `metadata`. Raises `unwritten`, and InputError for weights that float16 does not hold.
        """
        file = Path(folder) / hub.WEIGHTS
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_model(
                file, self.network.state_dict(), self.metadata, self.prior.state_dict(), self.latents.state_dict()
            )
        except SafetensorError as error:
            raise unwritten(f"{file} cannot be written: {error}") from None
        file.chmod(0o644)  # safetensors writes for the owner only
        file.with_name("config.json").write_text(json.dumps(self.metadata, indent=1, sort_keys=True) + "\n")

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes that samples can be asked for, in the order of their numbers; empty without any."""
        return self.prior.labels

    def find_label(self, label: int | str) -> int:
        """The number of a class by its name or number. Raises InputError where samples of it cannot be asked for."""
        names, prior = self.labels, cast(CodesPrior, self.prior)
        blind = f"the model was trained without classes, so label {label} cannot be drawn: train one with prior.classes"
        require((names, blind))
        number = names.index(label) if isinstance(label, str) and label in names else parse_number(str(label))
        known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        unknown = f"the model has no class '{printable(str(label), 40)}' among its {len(names)} classes"
        require((0 <= number < len(names), f"{unknown}: give a name ({known}) or a number from 0 to {len(names) - 1}"))
        none = f"label '{names[number]}' was not among the images of the training: ask for another"
        require((int(prior.class_counts[number]), none))
        return number

    def choose(self, ids: Tensor, *, seed: int = 0) -> Tensor | None:
        """Classes (len(ids),) int64 that `latent` draws, in proportion to the training images; None without classes."""
        return self.prior.choose(seed, SAMPLES, ids, self.device) if isinstance(self.prior, CodesPrior) else None

    def latent(
        self,
        ids: Tensor,
        *,
        seed: int = 0,
        label: int | str | None = None,
        latents: str = "",
    ) -> Tensor:
        """Latents (len(ids), *shape) float32 on the model's device, of the class `label` (name or number) if one is
        given; row i depends on (seed, ids[i]) and the class alone. `latents` are as in `sample`. InputError for a label
        that the model does not know.
        """
        known = ("", "prior", "noise") if self.has_prior else ("", "noise")
        require((latents in known, f"latents is '{latents}': choose one of {', '.join(filter(None, known))}"))
        if latents == "noise" or not self.has_prior:
            require((label is None, f"label {label} can be asked of a prior, and these are latents of noise"))
            return self.latents.draw(seed, SAMPLES, ids, self.device).contiguous()
        prior: Any = self.prior
        asked = () if label is None else (torch.full((len(ids),), self.find_label(label), device=self.device),)
        with torch.no_grad():
            return self._decoded(prior.draw(seed, SAMPLES, ids, self.device, *asked))

    def with_flow(self, **settings: float) -> "NAIGN":
        """This model with other settings of its flow of codes, `steps` or `guidance`, and without a student, which has
        learned the end points of the former ones; itself where only `guidance` is given, and is as trained.

        Raises InputError for a prior that is no flow, and for unfit settings.
        """
        known = self.metadata["prior"]
        other = f"{' and '.join(settings)} can be chosen for a flow of codes, and this prior is '{known['name']}'"
        require((known["name"] == "flow", f"{other}: leave it out"))
        if settings == {"guidance": known.get("guidance", 0.0)}:
            return self
        metadata = self.metadata | {"prior": known | {"student": 0} | settings}
        state = {name: value for name, value in self.state.items() if not name.startswith("prior.student.")}
        state["prior.phase"] = state["prior.phase"].clamp(max=KEPT)  # the flow draws again
        return NAIGN(self.network, metadata, state)

    def _decoded(self, drawn: Tensor) -> Tensor:
        return (self.network.decode(drawn) if self.prior.decodes else drawn).contiguous()  # type: ignore[operator]

    @torch.no_grad()
    def between(self, first: int, last: int, *, steps: int) -> Tensor:
        """Latents (steps, *shape) on the way from latent 0 of the seed `first` to latent 0 of the seed `last`.

        An arc where latents, or codes, are made from Gaussian noise, whose distribution they keep along it; elsewhere
        a straight line between two latents, or two codes.
        """
        prior = self.prior if self.has_prior else self.latents
        drawn = prior.between((first, last), SAMPLES, self.device, steps=steps)
        return self._decoded(drawn) if self.has_prior else drawn.contiguous()

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        label: int | str | None = None,  # name or number of a class; None: in proportion to the training images
        latents: str = "",  # noise, as in the paper, or prior; empty: the prior if there is one, else noise
        guidance: float | None = None,  # strength of guidance by classes, as prior.guidance; None: as trained
        times: int = 1,
        batch: int = 500,
        advance: Advance = None,
    ) -> Tensor:
        """n samples (n, *shape) float32: f applied `times` times to latents 0 to n - 1 of `seed`. InputError for a
        label or a guidance that the model does not know.
        """
        require((n >= 0 and batch > 0, f"n is {n} and batch {batch}: give 0 or more, in batches of 1 or more"))
        model = self if guidance is None else self.with_flow(guidance=guidance)
        parts = []
        for ids in torch.arange(n).split(batch):
            drawn = model.latent(ids, seed=seed, label=label, latents=latents)
            parts.append(self.project(drawn, times=times, advance=advance))
        return torch.cat(parts)

    def project(
        self,
        x: Tensor,
        *,
        times: int | None = None,
        mask: Tensor | None = None,
        batch: int = 500,
        advance: Advance = None,
    ) -> Tensor:
        """f applied `times` times to x (n, *shape): its repair, float32, on x's device. InputError where that is not
        finite, and for integers.

        Images (n, C, H, W) may have any height and width: those of another size than the model's are computed in
        overlapping tiles (pipeline/naign/model/tiles.py), and `advance` counts these.

        `mask`, bool and of a shape that broadcasts to x, such as (H, W), is true in holes to fill. They begin as the
        mean of what is known of their image. What is known is put back after each of `times` (default: FILLING)
        applications (pipeline/naign/model/holes.py), so that it stays bit for bit.
        """
        require(
            (isinstance(x, Tensor), f"the model takes tensors, not {type(x).__name__}: torch.from_numpy makes one"),
            (times is None or times >= 0, f"times is {times}: f is applied 0 times or more"),
            (batch > 0, f"batch is {batch}: f is applied to 1 row or more at once"),
        )
        images = len(self.shape) == 3 and x.ndim == 4 and x.shape[1] == self.shape[0] and min(x.shape[2:]) > 0
        any_size = f", or images of {self.shape[0]} channels and any size" if len(self.shape) == 3 else ""
        refused = f"the model takes {self.shape}{any_size}, not {tuple(x.shape[1:])}"
        integers = f"the model takes floating-point values, images in [-1, 1], not {x.dtype}: convert and scale them"
        require((images or x.shape[1:] == self.shape, refused), (x.is_floating_point(), integers))
        x = x.detach().float()
        if mask is not None:
            mask = _expanded(mask, x)
            filled = torch.where(mask, known_mean(x, ~mask), x)
            for _ in range(FILLING if times is None else times):
                filled = put_back(x, self.project(filled, batch=batch, advance=advance), mask)
            return filled
        times = 1 if times is None else times
        if x.shape[1:] == self.shape:
            return self._apply(x, times, batch, advance)
        size = (x.shape[2], x.shape[3])
        return torch.cat([*self.bands(lambda first, last: x[:, :, first:last], size, times=times, advance=advance)], 2)

    def bands(self, read: Read, size: tuple[int, int], *, times: int = 1, advance: Advance = None) -> Iterator[Tensor]:
        """f of images of `size` (height, width) that need not be in memory, as bands of rows from top to bottom.

        `read(first, last)` returns these rows as (n, C, last - first, W). Raises InputError as `project` does.
        """
        tile = (self.shape[1], self.shape[2])
        batch = max(1, PIXELS // math.prod(tile))
        return blended(lambda tiles: self._apply(tiles, times, batch, advance), read, size, tile)

    @torch.no_grad()
    def _apply(self, x: Tensor, times: int, batch: int, advance: Advance) -> Tensor:
        """f applied to x (n, *shape), `batch` rows at a time. InputError where that is not finite."""
        done = []
        for part in x.split(batch):
            value = part.to(self.device)
            for _ in range(times if len(part) else 0):  # layers refuse what is empty
                value = self.network(value)
            done.append(value.contiguous().to(x.device))
            if advance:
                advance(len(part))
        made = torch.cat(done)
        if not torch.isfinite(made).all():
            raise InputError("f gives values that are not finite: its training broke down, or what it was given is not")
        return made

    def energy(
        self, x: Tensor, *, times: int = 1, map: bool = False, batch: int = 500, advance: Advance = None
    ) -> Tensor:
        """Mean squared residual of f(x) - x over the values of each row: (n,). Low near the data.

        With `times` above 1 the residual after that many applications of f, which separates points far from the data
        better, at a cost proportional to `times`. With `map` the mean over channels alone, (n, H, W), of images
        (n, C, H, W) of any size.
        """
        squares = (self.project(x, times=times, batch=batch, advance=advance) - x.detach().float()).square()
        return squares.mean(1) if map else squares.flatten(1).mean(1)


def _expanded(mask: Tensor, x: Tensor) -> Tensor:
    if x.ndim == 4 and isinstance(mask, Tensor) and mask.dtype == torch.bool:
        with suppress(RuntimeError):
            return mask.expand_as(x)
    given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise InputError(f"the mask is {given}: give a bool tensor that broadcasts to {tuple(x.shape)}")


def save_model(
    file: Path,
    weights: Mapping[str, Tensor],
    metadata: dict[str, Any],
    prior: Mapping[str, Tensor],
    latents: Mapping[str, Tensor],
) -> None:
    """Write one safetensors file with the states of network, prior and latents; `metadata` names their kinds."""
    tensors = {name: _float32(value.detach()).cpu().contiguous() for name, value in weights.items()}
    tensors |= {_STATE + name: value.cpu().contiguous() for name, value in prior.items()}
    tensors |= {_NOISE + name: value.cpu().contiguous() for name, value in latents.items()}
    if metadata.get("dtype") == "float16":
        tensors = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
        fits = all(bool(torch.isfinite(value).all()) for value in tensors.values())
        require((fits, "the model has weights beyond 65504, which float16 does not hold: store it as float32"))
    save_file(tensors, file, metadata={_KEY: json.dumps(metadata, sort_keys=True)})


def _float32(value: Tensor) -> Tensor:
    """In float32, but for counters and masks."""
    return value.float() if value.is_floating_point() else value


def _read_settings(section: str, kind: Any, record: Mapping[str, Any]) -> Any:
    """The settings that a model file recorded; those that earlier versions had for training alone are passed over."""
    known = {field.name for field in fields(kind)}
    settings = kind(**{key: value for key, value in record.items() if key in known})
    check_fields(settings, section)
    settings.check()
    return settings
