"""Philox against the published vectors; normals against their distribution."""

import pytest
import torch
from scipy import stats

from naign import philox

# Random123's kat_vectors for philox4x32-10: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_gives_the_published_vectors(counter, key, output):
    words = philox.philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == output


@pytest.mark.parametrize(
    ("seed", "round", "first", "stream"),
    [
        (2, 1, 0, philox.LATENT),
        (1 + 2**32, 1, 0, philox.LATENT),
        (1, 2, 0, philox.LATENT),
        (1, 1, 4, philox.LATENT),
        (1, 1, 2**32, philox.LATENT),
        (1, 1, 0, philox.NOISE),
    ],
)
def test_seed_round_id_and_stream_all_matter(seed, round, first, stream):
    base = philox.normal(1, 1, torch.arange(4), (64,))
    other = philox.normal(seed, round, torch.arange(4) + first, (64,), stream=stream)
    assert correlation(base, other) < 0.25


def correlation(one, other):
    return abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]))


def test_normals_are_normal_and_neighbours_uncorrelated():
    values = philox.normal(0, 0, torch.arange(2000), (101,))
    assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 1e-3
    assert correlation(values[:-1], values[1:]) < 0.01
    assert correlation(values[:, :-1], values[:, 1:]) < 0.01
    assert torch.isfinite(values).all()


def test_uniforms_lie_in_their_interval():
    values = philox.uniform(0, 0, torch.arange(20_000), (3,))
    assert 0 < float(values.min()) < float(values.max()) <= 1
    assert stats.kstest(values.flatten().numpy(), "uniform").pvalue > 1e-3


def test_bad_ids_are_refused():
    with pytest.raises(ValueError, match="2\\*\\*62"):
        philox.normal(0, 0, torch.tensor([-1]), (3,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_draws_the_same_uniform_numbers():
    for shape in ((3, 8, 8), (7,)):
        here = philox.uniform(3, 2, torch.arange(1000), shape)
        there = philox.uniform(3, 2, torch.arange(1000), shape, "cuda")
        assert torch.equal(here, there.cpu())
