"""Latents as a pure function of (seed, round, id): nobody stores, gathers or sends them.

The generator is Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a keyed bijection
of a 128-bit counter, so any row can be drawn at any time, on any device, without drawing the rows before it. A normal
takes exactly one 32-bit draw (Box-Muller turns two into two), never a rejection, so positions are fixed.

    key      seed, low word | seed, high word
    counter  block of four draws | round | id, low word | id, high word

Two bits of a stream's number are the top ones of the id's high word, its next two those of the block. So a stream has
counters that no other has, and under one key no two draws coincide; a key changed for it would be another seed's.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import InputError

LAWS = ("gaussian", "smooth4", "mixture", "fourier")
"""Laws by name; the number of `smooth` may be any from 1 to 64."""

LATENT, SCALE, IMAGINARY, NOISE, JITTER, DAMAGE, FLAT = range(7)
"""Streams, 16 at most: independent draws for one (seed, round, id). Latents; offset and scale of flat ones; the
imaginary part of the fourier law; noise that an objective adds to images; noise added to matched latents; where and
how else images are damaged; the noise of flat latents."""

MAX_ID = 2**62
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CHUNK = 1 << 16  # counters drawn at once: the working set stays in the second-level cache


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox-4x32-10 of four int64 tensors holding 32-bit words; returns four such tensors of the broadcast shape."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps in int64 with the right bits; masking undoes the sign that the shift extends.
        p0, p1 = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((p1 >> 32) & _WORD) ^ b ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ d ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [a, b, c, d]


def normal(
    seed: int,  # any integer; its low 64 bits count
    round: int,  # 0 <= round < 2**32
    ids: Tensor,  # (n,) int64, 0 <= id < 2**62
    shape: tuple[int, ...],  # of one row
    device: torch.device | str = "cpu",
    *,
    stream: int = LATENT,
) -> Tensor:
    """Standard normals (n, *shape) float32; row i depends on (seed, round, ids[i], stream) alone."""
    return _rows(seed, round, ids, shape, device, stream, _box_muller)


def uniform(
    seed: int,  # as in `normal`
    round: int,  # as in `normal`
    ids: Tensor,  # as in `normal`
    shape: tuple[int, ...],  # of one row
    device: torch.device | str = "cpu",
    *,
    stream: int = LATENT,
) -> Tensor:
    """Uniforms in (0, 1], (n, *shape) float32; row i depends on (seed, round, ids[i], stream) alone."""
    return _rows(seed, round, ids, shape, device, stream, lambda words: [_unit(word) for word in words])


def draw(
    law: str,  # one of LAWS
    seed: int,  # as in `normal`
    round: int,  # as in `normal`
    ids: Tensor,  # as in `normal`
    shape: tuple[int, ...],  # of one row
    device: torch.device | str = "cpu",
    *,
    spectrum: Tensor | None = None,  # (2, 2, *shape): law `fourier` only, from `measure_spectrum`
    flat: float = 0.0,  # share of the ids, every round(1 / flat)-th, whose latents are flat whatever the law
) -> Tensor:
    """Latents (n, *shape) float32 by law; row i depends on (seed, round, ids[i]) alone.

    gaussian  N(0, I).
    smoothG   normals on a grid of G x G a channel, enlarged to the image by bicubic interpolation: noise of few
              dimensions, in which a pool of some thousand samples is dense enough that near images share near latents.
    mixture   N(0, I) for odd ids, flat for even ids.
    fourier   IGN's law (arXiv 2311.01462): each frequency normal with the data's mean and variance there.

    Flat latents are one offset U(-1, 1) a row plus a scale U(0, 1/2) times N(0, I). With some of them in the pool f is
    also trained to carry flat images to the data; a residual autoencoder leaves black where it is.
    """
    if flat:
        usual = draw(law, seed, round, ids, shape, device, spectrum=spectrum)
        chosen = (ids % max(1, int(1 / flat + 0.5)) == 0).to(usual.device)
        usual[chosen] = _flat(seed, round, ids[chosen.to(ids.device)], shape, device, FLAT)
        return usual
    match law:
        case "gaussian":
            return normal(seed, round, ids, shape, device)
        case "mixture":
            noise = normal(seed, round, ids, shape, device)
            even = (ids.to(noise.device) % 2 == 0).view(-1, *(1,) * len(shape))
            return torch.where(even, _flat(seed, round, ids, shape, device, LATENT), noise)
        case _ if grid := smooth_grid(law):
            coarse = normal(seed, round, ids, (shape[0], grid, grid), device)
            return F.interpolate(coarse, size=shape[1:], mode="bicubic")
        case "fourier":
            assert spectrum is not None, "the fourier law needs the data's spectrum"
            real = normal(seed, round, ids, shape, device)
            mean, deviation = spectrum.to(real.device)
            imaginary = normal(seed, round, ids, shape, device, stream=IMAGINARY)
            waves = torch.complex(mean[0] + deviation[0] * real, mean[1] + deviation[1] * imaginary)
            field: Tensor = torch.fft.ifft2(waves) if len(shape) == 3 else torch.fft.ifft(waves)
            return field.real
    raise AssertionError(f"unknown law '{law}': check_law is there to say so")


def _flat(
    seed: int, round: int, ids: Tensor, shape: tuple[int, ...], device: torch.device | str, stream: int
) -> Tensor:
    """(len(ids), *shape): an offset U(-1, 1) a row plus a scale U(0, 1/2) times the normals of `stream`."""
    rows = (len(ids),) + (1,) * len(shape)
    offset, scale = uniform(seed, round, ids, (2,), device, stream=SCALE).unbind(1)
    noise = normal(seed, round, ids, shape, device, stream=stream)
    return (2 * offset - 1).view(rows) + (scale / 2).view(rows) * noise


def smooth_grid(law: str) -> int:
    """G of the law smoothG; 0 for any other law."""
    digits = law.removeprefix("smooth") if law.startswith("smooth") else ""
    return int(digits) if digits.isdecimal() and 1 <= int(digits) <= 64 else 0


def check_law(law: str, shape: tuple[int, ...] | None = None) -> None:
    """InputError unless `law` names a law, and one for samples of that shape if it is given."""
    if law not in LAWS and not smooth_grid(law):
        raise InputError(f"match.latents is '{law}': choose one of {', '.join(LAWS)}")
    if shape and smooth_grid(law) and len(shape) != 3:
        raise InputError(f"match.latents={law} is for images, these are points: choose gaussian, mixture or fourier")


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


def _rows(
    seed: int,
    round: int,
    ids: Tensor,
    shape: tuple[int, ...],
    device: torch.device | str,
    stream: int,
    transform: Callable[[list[Tensor]], list[Tensor]],
) -> Tensor:
    size = math.prod(shape)
    blocks = -(-size // 4)
    assert blocks <= 2**30
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < MAX_ID:
        raise ValueError(f"latent ids must lie in [0, 2**62): got {int(ids.min())} to {int(ids.max())}")
    ids = ids.to(device)
    out = torch.empty(len(ids), blocks, 4, dtype=torch.float32, device=device)
    key = (seed & _WORD, (seed >> 32) & _WORD)
    block = torch.arange(blocks, device=device) | (stream >> 2) << 30
    rows = max(1, _CHUNK // max(blocks, 1))
    for start in range(0, len(ids), rows):
        part = ids[start : start + rows, None]
        high = (part >> 32) | (stream & 3) << 30
        counter = (block, torch.full_like(part, round), part & _WORD, high)
        for lane, values in enumerate(transform(philox(counter, key))):
            out[start : start + rows, :, lane] = values
    return out.view(len(ids), blocks * 4)[:, :size].reshape(len(ids), *shape)


def _unit(words: Tensor) -> Tensor:
    """32-bit words to (0, 1]; float32 keeps the small values that the normals' tails need."""
    return (words.float() + 0.5) * 2.0**-32


def _box_muller(words: list[Tensor]) -> list[Tensor]:
    values: list[Tensor] = []
    for first, second in (words[:2], words[2:]):
        radius = torch.sqrt(-2.0 * torch.log(_unit(first)))
        angle = _unit(second) * (2.0 * math.pi)
        values += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return values
