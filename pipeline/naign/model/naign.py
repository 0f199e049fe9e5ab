"""A trained model as its users hold it: sample, project, energy, from one safetensors file."""

import json
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from naign.data.damage import known_mean
from naign.data.format.labels import parse_number
from naign.errors import InputError, one_line, printable, unwritten
from naign.model.bank import Bank, Scores
from naign.model.files import WEIGHTS, open_weights, read_model, save_model
from naign.model.holes import put_back
from naign.model.networks import build_network, find_network
from naign.model.prior import CodesPrior, build_latents, build_prior, find_latents, find_prior
from naign.model.tiles import PIXELS, blended
from naign.philox import SAMPLES
from naign.settings.constraints import check_fields

FILLING = 8  # applications of f that fill a hole
ROWS = 500  # samples or images computed at once at most

Advance = Callable[[int], object] | None
"""Called with the number of rows that were just computed."""


class NAIGN:
    """An idempotent generative network f and the prior of its latents.

        model = NAIGN.from_pretrained("runs/mnist")
        samples = model.sample(16)
        repaired = model.project(images)
        energy = model.energy(images)

    Images are float32 in [-1, 1], NCHW; points are (n, D) float32. `metadata` says where the model comes from.
    """

    def __init__(
        self,
        network: nn.Module,
        metadata: dict[str, Any],
        state: Mapping[str, Tensor] | None = None,  # as `state` returns it
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.metadata = metadata
        self.shape: tuple[int, ...] = tuple(metadata["shape"])
        self.checkpoint = ""  # of a run: the checkpoint's name
        self._rows = max(1, min(ROWS, PIXELS // math.prod(self.shape[-2:])))  # computed at once
        noise = read_settings("latents", metadata.get("latents", {"name": "gaussian"}))
        settings = read_settings("prior", metadata["prior"])
        with torch.device("meta"):  # what the settings claim is checked against `state` before it is allocated
            self.latents = build_latents(noise, self.shape)
            self.prior = build_prior(
                settings,
                self.shape,
                network,
                labels=metadata.get("labels", ()),
            )
            self.bank = Bank(*metadata.get("bank", ()), values=math.prod(self.prior.shape))
        self._kept = nn.ModuleDict({"latents": self.latents, "prior": self.prior})
        if self.has_bank:
            self._kept["bank"] = self.bank
        self._kept.load_state_dict(state or {}, assign=True)
        if self.has_bank:
            self.bank.check()
        self._place(self.device)

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path,
        device: torch.device | str = "cpu",
        **download: Any,
    ) -> "NAIGN":
        """The model of an exported folder or its file, a checkpoint, a run (also s3://), hf://user/model on the hub, or
        the name of one that comes with this package ("mnist"), which is looked up only where no path has it.

        Of a run it is the newest complete checkpoint (`checkpoint`); of a checkpoint the moving average of the weights,
        if it has one. `download`, for the hub alone, are keywords of huggingface_hub.hf_hub_download: revision, token,
        cache_dir, ...
        Raises InputError where there is no model, or the file was not written by this program.
        """
        with open_weights(place, **download) as (file, checkpoint):
            header, weights, state = read_model(file)
        try:
            metadata = json.loads(header)
            model = cls(_build(metadata, weights), metadata, state)
            _ = model.fitted, model._learned_noise  # of what the header must say
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RuntimeError) as error:
            why = one_line(error)
            raise InputError(f"{file} does not hold the model that its header describes: {why}") from None
        model.checkpoint = checkpoint
        model._place(device)
        return model

    def _place(self, device: torch.device | str) -> None:
        """Move to the device; on a CPU to channels-last, where convolutions take about two thirds of the time."""
        on_cpu = torch.device(device).type == "cpu"
        for part in (self.network, *self._kept.values()):
            layout = torch.contiguous_format
            if on_cpu and type(part).__module__.startswith("naign."):  # other networks may view() activations
                layout = torch.channels_last
            for weight in part.to(device).parameters():
                if weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=layout)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors, in float16 if metadata["dtype"] says so and else in float32, and, for readers,
        config.json with `metadata`. Raises `unwritten`, and InputError for weights that float16 does not hold.
        """
        file = Path(folder) / WEIGHTS
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_model(
                file,
                self.network.state_dict(),
                self.metadata,
                self.state,
            )
        except SafetensorError as error:
            raise unwritten(f"{file} cannot be written: {error}") from None
        file.chmod(0o644)  # safetensors writes for the owner only
        text = json.dumps(self.metadata, indent=1, sort_keys=True)
        file.with_name("config.json").write_text(text + "\n")

    @property
    def device(self) -> torch.device:
        """Where f computes."""
        return next(self.network.parameters()).device

    @property
    def state(self) -> dict[str, Tensor]:
        """The state of latents, prior and bank, which with `network` and `metadata` makes the same model."""
        return self._kept.state_dict()

    @property
    def has_prior(self) -> bool:
        """Whether samples are drawn from a prior, rather than from noise."""
        return bool(self.metadata["prior"]["name"] != "none")

    @property
    def has_bank(self) -> bool:
        """Whether `score` is possible."""
        return "bank" in self.metadata

    @property
    def fitted(self) -> bool:
        """Whether the prior, if there is one, is fitted: a run that was stopped may have a model before that."""
        return not self.prior.learns or self.metadata.get("fitted", 1.0) >= 1

    @property
    def _learned_noise(self) -> bool:
        objective = self.metadata.get("config", {}).get("objective", {})
        return bool(objective.get("imle", 1)) or objective.get("third") == "matched"

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes that samples can be asked for, in the order of their numbers; empty without any."""
        return self.prior.labels

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        label: int | str | None = None,  # name or number of a class; None: in proportion to the training images
        latents: str = "",  # noise, as in the paper, or prior; empty: the prior if there is one, else noise
        times: int = 1,  # applications of f
        advance: Advance = None,
    ) -> Tensor:
        """n samples (n, *shape) float32: f applied to latents 0 to n - 1 of `seed`.

        Raises InputError for a label or latents that the model does not know.
        """
        if n < 0:
            raise InputError(f"n is {n}: give 0 or more")
        if (latents == "noise" or not self.has_prior) and not self._learned_noise:
            told = "this model was trained without IMLE, so that f of noise is a blur"
            if self.has_prior:
                told += ": leave latents out"
            warnings.warn(told, stacklevel=2)
        parts = []
        for ids in torch.arange(n).split(self._rows):
            drawn = self.latent(
                ids,
                seed=seed,
                label=label,
                latents=latents,
            )
            parts.append(self.project(drawn, times=times, advance=advance))
        return torch.cat(parts)

    def project(
        self,
        x: Tensor,
        *,
        times: int | None = None,  # applications of f; None: 1, with a mask FILLING
        mask: Tensor | None = None,
        advance: Advance = None,
    ) -> Tensor:
        """f applied to x (n, *shape): its repair, float32, on x's device.

        Images (n, C, H, W) may have any height and width: those of another size than the model's are computed in
        overlapping tiles (pipeline/naign/model/tiles.py), and `advance` counts these.

        `mask`, bool and of a shape that broadcasts to x, such as (H, W), is true in holes to fill. They begin as the
        mean of what is known of their image. What is known is put back after each application
        (pipeline/naign/model/holes.py), so that it stays bit for bit.

        Raises InputError for integers, another shape, and where the result is not finite.
        """
        x = self._checked(x)
        if times is None:
            times = 1 if mask is None else FILLING
        if times < 0:
            raise InputError(f"times is {times}: f is applied 0 times or more")
        if mask is not None:
            mask = _expanded(mask, x)
            filled = torch.where(mask, known_mean(x, ~mask), x)
            for _ in range(times):
                filled = put_back(x, self.project(filled, advance=advance), mask)
            return filled
        f = partial(self._apply, times=times, advance=advance)
        if x.shape[1:] == self.shape:
            return f(x)
        return blended(f, x, self.shape[1:])

    def energy(
        self,
        x: Tensor,
        *,
        times: int = 1,
        map: bool = False,
        advance: Advance = None,
    ) -> Tensor:
        """Mean squared residual of f(x) - x over the values of each row: (n,). Low near the data.

        With `times` above 1 the residual after that many applications of f, which separates points far from the data
        better, at a cost proportional to `times`. With `map` the mean over channels alone, (n, H, W), of images
        (n, C, H, W) of any size.
        """
        made = self.project(x, times=times, advance=advance)
        squares = (made - x.detach().float()).square()
        if map:
            return squares.mean(1)
        return squares.flatten(1).mean(1)

    def score(
        self,
        x: Tensor,
        *,
        times: int = 1,
        advance: Advance = None,
    ) -> Scores:
        """How unlike the training images x (n, *shape) is, by its energy and by the distance of its codes from those of
        the bank.

        Raises InputError for a model without a bank, and for images of another size than the model's.
        """
        if not self.has_bank:
            raise InputError("the model has no bank, which training writes once it fits a prior to codes: use energy")
        x = self._checked(x)
        if x.shape[1:] != self.shape:
            raise InputError(
                f"the bank is of images {self.shape}, not {tuple(x.shape[1:])}: resize them, or use energy"
            )
        energies = self.energy(x, times=times, advance=advance)
        codes = [self._encode(part) for part in x.split(self._rows)]
        distances = self.bank.distance(torch.cat(codes))
        return self.bank.score(energies, distances.to(energies))

    def latent(
        self,
        ids: Tensor,
        *,
        seed: int = 0,
        label: int | str | None = None,
        latents: str = "",
    ) -> Tensor:
        """Latents (len(ids), *shape) float32 on the model's device, of the class `label` (name or number) if one is
        given; row i depends on (seed, ids[i]) and the class alone. `latents` is as for `sample`.

        Raises InputError for a label or latents that the model does not know.
        """
        if latents not in ("", "prior", "noise"):
            raise InputError(f"latents is '{latents}': choose prior or noise")
        if latents == "prior" and not self.has_prior:
            raise InputError("this model has no prior: leave latents out, and samples are f of noise")
        if latents == "noise" or not self.has_prior:
            if label is not None:
                raise InputError(f"label {label} can be asked of a prior with classes, and these are latents of noise")
            return self.latents.draw(seed, SAMPLES, ids, self.device).contiguous()
        asked = []
        if label is not None:
            number = self.find_label(label)
            asked.append(torch.full((len(ids),), number, device=self.device))
        with torch.no_grad():
            drawn = self.prior.draw(
                seed,
                SAMPLES,
                ids,
                self.device,
                *asked,
            )
            if self.prior.decodes:
                drawn = self.network.decode(drawn)  # type: ignore[operator]
        return drawn.contiguous()

    def choose(self, ids: Tensor, *, seed: int = 0) -> Tensor | None:
        """Classes (len(ids),) int64 that `latent` draws, in proportion to the training images; None without classes."""
        if not isinstance(self.prior, CodesPrior):
            return None
        return self.prior.choose(seed, SAMPLES, ids, self.device)

    def find_label(self, label: int | str) -> int:
        """The number of a class by its name or number. Raises InputError where samples of it cannot be asked for."""
        names = self.labels
        if not names:
            blind = f"the model was trained without classes, so label {label} cannot be drawn"
            raise InputError(f"{blind}: train one with prior.classes")
        number = names.index(label) if label in names else parse_number(str(label))
        if not 0 <= number < len(names):
            unknown = f"the model has no class '{printable(str(label), 40)}' among its {len(names)} classes"
            known = ", ".join(names[:20])
            raise InputError(f"{unknown}: give a name ({known}) or a number from 0 to {len(names) - 1}")
        if not cast(CodesPrior, self.prior).class_counts[number]:
            raise InputError(f"label '{names[number]}' was not among the images of the training: ask for another")
        return number

    def with_flow(self, **settings: float) -> "NAIGN":
        """This model with other settings of its flow of codes, `steps` or `guidance`, and without its student, which
        has learned by the former ones.

        Raises InputError for a prior that is no flow, and for unfit settings.
        """
        known = self.metadata["prior"]
        if known["name"] != "flow":
            other = f"{' and '.join(settings)} can be chosen for a flow of codes, and this prior is '{known['name']}'"
            raise InputError(f"{other}: leave it out")
        if settings.get("guidance") and not known["guidance"]:
            raise InputError("the flow was trained without guidance: leave it out, or train with prior.guidance")
        state = {name: value for name, value in self.state.items() if not name.startswith("prior.student.")}
        return NAIGN(self.network, self.metadata | {"prior": known | {"student": 0} | settings}, state)

    @torch.no_grad()
    def _encode(self, x: Tensor) -> Tensor:
        """The codes of a batch of images, on its device."""
        codes: Tensor = self.network.encode(x.to(self.device))  # type: ignore[operator]
        return codes

    @torch.no_grad()
    def _apply(self, x: Tensor, times: int, advance: Advance) -> Tensor:
        """f applied to x (n, *shape) in batches. InputError where the result is not finite."""
        done = []
        for part in x.split(self._rows):
            value = part.to(self.device)
            if len(part):  # layers refuse what is empty
                for _ in range(times):
                    value = self.network(value)
            done.append(value.contiguous().to(x.device))
            if advance:
                advance(len(part))
        made = torch.cat(done)
        if not torch.isfinite(made).all():
            raise InputError("f gives values that are not finite: its training broke down, or what it was given is not")
        return made

    def _checked(self, x: Tensor) -> Tensor:
        """x in float32. Raises InputError for what f cannot be applied to."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = getattr(x, "dtype", type(x).__name__)
            raise InputError(f"the model takes floating-point tensors, images in [-1, 1], not {given}: convert them")
        images = len(self.shape) == 3 and x.ndim == 4
        any_size = images and x.shape[1] == self.shape[0] and min(x.shape[2:]) > 0
        if not any_size and x.shape[1:] != self.shape:
            takes = f"{self.shape}, images also of another height and width"
            raise InputError(f"the model takes {takes}, not {tuple(x.shape[1:])}")
        return x.detach().float()


def warn_if_unfitted(model: NAIGN, run: str) -> None:
    """Print on stderr that the samples of a run are worthless where it stopped too early."""
    if not model.fitted:
        print(f"warning: {run} stopped before its prior was fitted: its samples say nothing", file=sys.stderr)


def _build(metadata: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """The network that a file's header describes, with its weights; an error of any kind where these do not fit."""
    config = read_settings("model", metadata["model"])
    shape = tuple(metadata["shape"])
    with torch.device("meta"):  # what the header claims is checked against the file before it is allocated
        network = build_network(config, shape)
    network.load_state_dict(weights, assign=True)
    if any(value.is_meta for value in network.buffers()):  # computed when a network is built, not saved
        with torch.random.fork_rng(devices=[]):
            network = build_network(config, shape)
        network.load_state_dict(weights)
    return network


def _expanded(mask: Tensor, x: Tensor) -> Tensor:
    """The mask in the shape of images x; InputError where that is not possible."""
    if x.ndim == 4 and isinstance(mask, Tensor) and mask.dtype == torch.bool:
        with suppress(RuntimeError):
            return mask.expand_as(x)
    raise InputError(f"the mask does not fit: give a bool tensor that broadcasts to {tuple(x.shape)}")


def read_settings(section: str, record: Mapping[str, Any]) -> Any:
    """The settings of a section that a model file recorded; those that other versions have are passed over.

    Raises InputError, KeyError or TypeError for what no run wrote.
    """
    kind, _ = FIND[section](record["name"])
    known = {field.name for field in fields(kind)}
    settings = kind(**{key: value for key, value in record.items() if key in known})
    check_fields(settings, section)
    settings.check()
    return settings


FIND: dict[str, Callable[[str], tuple[Any, Any]]] = {
    "model": find_network,
    "latents": find_latents,
    "prior": find_prior,
}
