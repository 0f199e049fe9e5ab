"""Laws of latents by name: pure functions of (seed, round, id), drawn with Philox.

A law is one line in LAWS, or an entry point of the group `naign.latents` in another package.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.model.flow import CodeFlow
from pipeline.model.mixture import check_mixture, draw_mixture, is_mixture
from pipeline.model.networks import Autoencoder, require_code
from pipeline.philox import FLAT, IMAGINARY, LATENT, SCALE, normal, uniform
from pipeline.settings.registry import lookup

Shape = tuple[int, ...]
Device = torch.device | str
State = Mapping[str, Tensor]
Decode = Callable[[Tensor], Tensor]
"""Of codes (n, dims), the images (n, *shape) that f decodes from them."""
Law = Callable[..., Tensor]
"""Of (seed, round, ids, shape, device) and, by keyword, what it takes of (state, decode, code), as in `draw`."""


def draw(
    law: str,  # one of LAWS, smoothG, or one that another package registers
    seed: int,  # as in `normal`
    round: int,  # as in `normal`
    ids: Tensor,  # as in `normal`
    shape: Shape,  # of one row
    device: Device = "cpu",
    *,
    state: State = MappingProxyType({}),  # what the law was measured or has learned to be: of fourier and codes
    decode: Decode | None = None,  # of f, for laws that draw codes
    code: Shape | None = None,  # of a code of f
    flat: float = 0.0,  # share of the ids, every round(1 / flat)-th, whose latents are flat whatever the law
) -> Tensor:
    """Latents (n, *shape) float32 by law; row i depends on (seed, round, ids[i]) alone.

    gaussian  N(0, I).
    smoothG   normals on a grid of G x G a channel, enlarged to the image by bicubic interpolation: noise of few
              dimensions, in which a pool of some thousand samples is dense enough that near images share near latents.
    mixture   N(0, I) for odd ids, flat for even ids.
    fourier   IGN's law (arXiv 2311.01462): each frequency normal with the data's mean and variance there; its state is
              `measure_spectrum`'s.
    codes     what f decodes from codes that a flow or a mixture draws: its state is a CodeFlow's or fit_mixture's.

    Flat latents are one offset U(-1, 1) a row plus a scale U(0, 1/2) times N(0, I). With some of them in the pool f is
    also trained to carry flat images to the data; a residual autoencoder leaves black where it is.
    """
    if flat:
        key = seed, round, ids, shape, device
        usual = draw(law, *key, state=state, decode=decode, code=code)
        chosen = (ids % max(1, int(1 / flat + 0.5)) == 0).to(usual.device)
        if usual.device.type != "cpu":  # which rows, a GPU would have to tell the host first
            return torch.where(chosen.view(-1, *(1,) * len(shape)), _flat(*key, FLAT), usual)
        usual[chosen] = _flat(seed, round, ids[chosen.to(ids.device)], shape, device, FLAT)
        return usual
    given = {"state": state, "decode": decode, "code": code}
    taken = signature(found := find_law(law)).parameters
    return found(seed, round, ids, shape, device, **{name: given[name] for name in given if name in taken})


def decodes(law: str) -> bool:
    """Whether its latents are decoded by f from codes, and so are samples themselves."""
    return "decode" in signature(find_law(law)).parameters


def has_state(law: str) -> bool:
    """Whether it is drawn from a state that a run measures or learns."""
    return "state" in signature(find_law(law)).parameters


def find_law(law: str) -> Law:
    """The function of that name; InputError for an unknown one. The G of smoothG may be any from 1 to 64."""
    grid = smooth_grid(law)
    return partial(_smooth, grid) if grid else lookup("match.latents", law, LAWS, "naign.latents")


def _smooth(grid: int, seed: int, round: int, ids: Tensor, shape: Shape, device: Device) -> Tensor:
    coarse = normal(seed, round, ids, (shape[0], grid, grid), device)
    return F.interpolate(coarse, size=shape[1:], mode="bicubic")


def _mixture(seed: int, round: int, ids: Tensor, shape: Shape, device: Device) -> Tensor:
    noise = normal(seed, round, ids, shape, device)
    even = (ids.to(noise.device) % 2 == 0).view(-1, *(1,) * len(shape))
    return torch.where(even, _flat(seed, round, ids, shape, device, LATENT), noise)


def _codes(
    seed: int,
    round: int,
    ids: Tensor,
    shape: Shape,
    device: Device,
    *,
    state: State,
    decode: Decode | None,
    code: Shape | None,
) -> Tensor:
    assert decode is not None, "the law codes needs a network with a code"
    if is_mixture(state):
        return decode(draw_mixture(state, seed, round, ids, device, code))
    flow = CodeFlow.of(state)
    return decode(flow.draw(normal(seed, round, ids, flow.noise_shape, device)))


def codes_between(seeds: tuple[int, int], round: int, state: State, *, steps: int) -> Tensor:
    """Codes (steps, ...) on the way from that of (seeds[0], round, id 0) to that of (seeds[1], round, id 0)."""
    ids, device = torch.zeros(1, dtype=torch.int64), next(iter(state.values())).device
    if is_mixture(state):
        return way(*(draw_mixture(state, seed, round, ids, device) for seed in seeds), steps=steps, arc=False)
    flow = CodeFlow.of(state)
    noise = [normal(seed, round, ids, flow.noise_shape, device) for seed in seeds]
    return flow.draw(way(*noise, steps=steps, arc=True))


def way(first: Tensor, last: Tensor, *, steps: int, arc: bool) -> Tensor:
    """(1, ...), (1, ...) -> (steps, ...) from one to the other, in equal steps of an arc's angle or of a line."""
    share = torch.linspace(0, 1, steps, device=first.device).view(-1, *(1,) * (first.ndim - 1))
    cosine = F.cosine_similarity(first.flatten(), last.flatten(), dim=0)
    angle = cosine.clamp(-1, 1).acos()
    if not arc or angle < 1e-3 or angle > math.pi - 1e-3:  # in one line no arc is the shortest
        return torch.lerp(first, last, share)
    points: Tensor = (((1 - share) * angle).sin() * first + (share * angle).sin() * last) / angle.sin()
    return points


def _fourier(seed: int, round: int, ids: Tensor, shape: Shape, device: Device, *, state: State) -> Tensor:
    real = normal(seed, round, ids, shape, device)
    mean, deviation = state["spectrum"].to(real.device)
    imaginary = normal(seed, round, ids, shape, device, stream=IMAGINARY)
    waves = torch.complex(mean[0] + deviation[0] * real, mean[1] + deviation[1] * imaginary)
    field: Tensor = torch.fft.ifft2(waves) if len(shape) == 3 else torch.fft.ifft(waves)
    return field.real


LAWS: dict[str, Law] = {"gaussian": normal, "smooth4": partial(_smooth, 4), "mixture": _mixture, "fourier": _fourier}
LAWS["codes"] = _codes


def _flat(seed: int, round: int, ids: Tensor, shape: Shape, device: Device, stream: int) -> Tensor:
    """(len(ids), *shape): an offset U(-1, 1) a row plus a scale U(0, 1/2) times the normals of `stream`."""
    rows = (len(ids),) + (1,) * len(shape)
    offset, scale = uniform(seed, round, ids, (2,), device, stream=SCALE).unbind(1)
    noise = normal(seed, round, ids, shape, device, stream=stream)
    return (2 * offset - 1).view(rows) + (scale / 2).view(rows) * noise


def smooth_grid(law: str) -> int:
    """G of the law smoothG; 0 for any other law."""
    found = re.fullmatch(r"smooth(\d{1,9})", law)
    return int(found[1]) if found and 1 <= int(found[1]) <= 64 else 0


def check_law(law: str, shape: tuple[int, ...] | None = None, network: nn.Module | None = None) -> None:
    """InputError unless `law` names a law, and one for samples of that shape and for that network if they are given."""
    find_law(law)
    if network is not None and decodes(law):
        require_code(network, f"match.latents={law}")
    if shape and smooth_grid(law) and len(shape) != 3:
        raise InputError(f"match.latents={law} is for images, these are points: choose gaussian, mixture or fourier")


def check_state(law: str, state: State, network: nn.Module) -> None:
    """Raises KeyError, ValueError or RuntimeError where that is not the state of such a law for that network."""
    if decodes(law) and not isinstance(network, Autoencoder):
        raise ValueError(f"the law {law} needs a network with a code")
    if law == "codes":
        shape = check_mixture(state) if is_mixture(state) else tuple(CodeFlow.of(state).shape.tolist())
        if shape != network.code:
            raise ValueError("the law of its codes is of another network")
    if law == "fourier":
        state["spectrum"]


def measure_spectrum(
    images: Tensor,  # (n, *shape) float32
    average: Callable[[Tensor], Tensor] = lambda moments: moments,  # mean over ranks of equally many images
) -> Tensor:
    """Mean and standard deviation of the real and imaginary part at each frequency: (2, 2, *shape) float32.

    First axis: mean, deviation; second: real, imaginary.
    """
    waves = torch.fft.fft2(images) if images.ndim == 4 else torch.fft.fft(images)
    parts = torch.stack([waves.real, waves.imag], dim=1).double()
    mean, square = average(torch.stack([parts.mean(0), parts.square().mean(0)]))
    return torch.stack([mean, (square - mean.square()).clamp(min=0).sqrt()]).float()
