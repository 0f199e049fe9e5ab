"""The draws of `philox` as one kernel for GPUs, in Triton, which torch brings along there."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_SIZE = 512  # counters a program


@triton.jit(do_not_specialize=["round", "low", "high", "block_bits", "id_bits"])
def _draw(ids, out, blocks, count, round, low, high, block_bits, id_bits, NORMALS: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    id = tl.load(ids + at // blocks, mask=inside, other=0)
    a = (at % blocks).to(tl.uint32) | block_bits.to(tl.uint32)
    b = tl.zeros((SIZE,), tl.uint32) + round.to(tl.uint32)
    c = (id & 0xFFFFFFFF).to(tl.uint32)
    d = (id >> 32).to(tl.uint32) | id_bits.to(tl.uint32)
    key0 = tl.zeros((SIZE,), tl.uint32) + low.to(tl.uint32)
    key1 = tl.zeros((SIZE,), tl.uint32) + high.to(tl.uint32)
    first = tl.full((SIZE,), 0xD2511F53, tl.uint32)
    second = tl.full((SIZE,), 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        over0 = tl.umulhi(a, first)
        under0 = a * first
        over1 = tl.umulhi(c, second)
        under1 = c * second
        a = over1 ^ b ^ key0
        b = under1
        c = over0 ^ d ^ key1
        d = under0
        key0 += tl.full((SIZE,), 0x9E3779B9, tl.uint32)
        key1 += tl.full((SIZE,), 0xBB67AE85, tl.uint32)
    a = _unit(a)
    b = _unit(b)
    c = _unit(c)
    d = _unit(d)
    if NORMALS:
        radius = tl.sqrt_rn(-2.0 * tl.log(a))
        angle = b * 6.283185307179586
        a = radius * tl.cos(angle)
        b = radius * tl.sin(angle)
        radius = tl.sqrt_rn(-2.0 * tl.log(c))
        angle = d * 6.283185307179586
        c = radius * tl.cos(angle)
        d = radius * tl.sin(angle)
    to = out + at * 4
    tl.store(to, a, mask=inside)
    tl.store(to + 1, b, mask=inside)
    tl.store(to + 2, c, mask=inside)
    tl.store(to + 3, d, mask=inside)


@triton.jit
def _unit(words):
    return (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2**-32


def drawn(ids: Tensor, blocks: int, seed: int, round: int, stream: int, normals: bool) -> Tensor:
    """See philox._drawn."""
    out = torch.empty(len(ids), blocks, 4, dtype=torch.float32, device=ids.device)
    count = len(ids) * blocks
    if count:
        _draw[(triton.cdiv(count, _SIZE),)](
            ids.contiguous(),
            out,
            blocks,
            count,
            round,
            low=seed & 0xFFFFFFFF,
            high=(seed >> 32) & 0xFFFFFFFF,
            block_bits=(stream >> 2) << 30,
            id_bits=(stream & 3) << 30,
            NORMALS=normals,
            SIZE=_SIZE,
        )
    return out
