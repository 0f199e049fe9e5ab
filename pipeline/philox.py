"""Random numbers as a pure function of (seed, round, id, stream), so that nobody stores, gathers or sends them.

The generator is Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a keyed bijection
of a 128-bit counter. Any row can be drawn at any time, on any device, without the rows before it. Every normal takes
exactly one 32-bit draw (Box-Muller turns two into two, without rejection), so positions are fixed.

    key      seed, low word | seed, high word
    counter  block of four draws | round | id, low word | id, high word

The stream is part of the counter: its lower two bits are the top bits of the id's high word, its upper two those of the
block. Draws of different streams therefore never coincide under one key, as they could if the stream changed the key.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

LATENT, SCALE, IMAGINARY, NOISE, JITTER, DAMAGE, FLAT, LEARN = range(8)
"""Streams, 16 at most: independent draws for one (seed, round, id). Latents; offset and scale of flat latents; the
imaginary part of the fourier law; noise that an objective adds to images; noise added to matched latents; other damage
to images; the noise of flat latents; what the law `codes` learns with."""

MAX_ID = 2**62
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
Words = Callable[[list[Tensor]], list[Tensor]]  # four words of 32 bits to four float32
_CHUNK = 1 << 16  # counters drawn at once, to stay in the second-level cache


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox-4x32-10 of four int64 tensors that hold 32-bit words: four such tensors of the broadcast shape."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps in int64 with the right bits; the mask removes the sign that the shift extends.
        p0, p1 = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (((p1 >> 32) & _WORD) ^ b ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ d ^ k1, p0 & _WORD)
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [a, b, c, d]


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


def normal(
    seed: int,  # any integer; its low 64 bits count
    round: int,  # 0 <= round < 2**32
    ids: Tensor,  # (n,) int64, 0 <= id < 2**62
    shape: tuple[int, ...],  # of one row
    device: torch.device | str = "cpu",
    *,
    stream: int = LATENT,
    law: Words = _box_muller,  # turns uniform words into what is drawn: `uniform` has another one
) -> Tensor:
    """Standard normals (n, *shape) float32; row i depends on (seed, round, ids[i], stream) alone.

    Raises ValueError for an id outside [0, 2**62).
    """
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
        for lane, values in enumerate(law(philox(counter, key))):
            out[start : start + rows, :, lane] = values
    return out.view(len(ids), blocks * 4)[:, :size].reshape(len(ids), *shape)


uniform = partial(normal, law=lambda words: [_unit(word) for word in words])  # as `normal`, but uniform in (0, 1]
