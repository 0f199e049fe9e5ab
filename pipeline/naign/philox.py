"""Random numbers as a pure function of (seed, round, id, stream), the same on every world size: none is stored or sent.

The generator is Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a keyed bijection
of a 128-bit counter. Any row can be drawn at any time, on any device, without the rows before it. Every normal takes
exactly one 32-bit draw (Box-Muller turns two into two, without rejection), so positions are fixed.

    key      seed, low word | seed, high word
    counter  block of four draws | round | id, low word | id, high word

The stream is part of the counter: its lower two bits are the top bits of the id's high word, its upper two those of the
block. Draws of different streams therefore never coincide under one key, as they could if the stream changed the key.
"""

import math
from functools import partial

import torch
from torch import Tensor

# Streams, 16 at most: independent draws for one (seed, round, id).
LATENT = 0
SCALE = 1  # the component of a mixture
IMAGINARY = 2  # the imaginary part of the latents `fourier`, and the noise that `smooth` ones are buried in
NOISE = 3  # noise that an objective adds to images
ORDER = 4  # the order of a round's rows
DAMAGE = 5  # other damage to images
CLASS = 6  # the class of a sample
LEARN = 7  # what a prior is fitted with

MAX_ID = 2**62
SAMPLES = 2**32 - 1  # round of latents that training never draws: of samples, pictures and measurements
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CHUNK = {"cpu": 1 << 14, "cuda": 1 << 24}
"""Counters drawn at once, on a CPU to stay in the second-level cache, on a GPU in few launches."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox-4x32-10 of four int64 tensors that hold 32-bit words: four such tensors of the broadcast shape."""
    a, b, c, d = counter
    for number in range(10):
        key0 = (key[0] + number * _WEYL[0]) & _WORD
        key1 = (key[1] + number * _WEYL[1]) & _WORD
        # The 64-bit product wraps in int64 with the right bits; the mask removes the sign that the shift extends.
        first = a * _MULTIPLIERS[0]
        second = c * _MULTIPLIERS[1]
        a = ((second >> 32) & _WORD) ^ b ^ key0
        b = second & _WORD
        c = ((first >> 32) & _WORD) ^ d ^ key1
        d = first & _WORD
    return [a, b, c, d]


def _box_muller(first: Tensor, second: Tensor) -> list[Tensor]:
    radius = torch.sqrt(-2.0 * torch.log(first))
    angle = second * (2.0 * math.pi)
    return [radius * torch.cos(angle), radius * torch.sin(angle)]


def normal(
    seed: int,  # any integer; its low 64 bits count
    round: int,  # 0 <= round < 2**32
    ids: Tensor,  # (n,) int64, 0 <= id < 2**62
    shape: tuple[int, ...],  # of one row
    device: torch.device | str = "cpu",
    *,
    stream: int = LATENT,
    normals: bool = True,  # else uniform numbers in (0, 1]
) -> Tensor:
    """Standard normals (n, *shape) float32; row i depends on (seed, round, ids[i], stream) alone.

    Uniform numbers have the same bits on every device; normals may differ in the last ones, as logarithm and cosine do.
    Raises ValueError for an id outside [0, 2**62), where the ids are in the host's memory.
    """
    size = math.prod(shape)
    blocks = -(-size // 4)
    assert blocks <= 2**30 and 0 <= round < 2**32 and 0 <= stream < 16
    if ids.device.type == "cpu" and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < MAX_ID:
        raise ValueError(f"latent ids must lie in [0, 2**62): got {int(ids.min())} to {int(ids.max())}")
    where = "cpu" if torch.device(device).type == "mps" else device  # not tried there
    ids = ids.to(where, torch.int64)
    out = torch.empty(
        len(ids),
        blocks,
        4,
        dtype=torch.float32,
        device=where,
    )
    key = (seed & _WORD, (seed >> 32) & _WORD)
    block = torch.arange(blocks, device=where) | (stream >> 2) << 30
    rows = max(1, _CHUNK.get(ids.device.type, _CHUNK["cpu"]) // max(blocks, 1))
    for start in range(0, len(ids), rows):
        some = ids[start : start + rows, None]
        high = (some >> 32) | (stream & 3) << 30
        counter = (block, torch.full_like(some, round), some & _WORD, high)
        # In (0, 1]: float32 keeps the small values that the normals' tails need.
        values = [(words.float() + 0.5) * 2.0**-32 for words in philox(counter, key)]
        if normals:
            values = [*_box_muller(*values[:2]), *_box_muller(*values[2:])]
        for lane, numbers in enumerate(values):
            out[start : start + rows, :, lane] = numbers
    return out.to(device).view(len(ids), blocks * 4)[:, :size].reshape(len(ids), *shape)


uniform = partial(normal, normals=False)
"""As `normal`, but uniform in (0, 1]."""
