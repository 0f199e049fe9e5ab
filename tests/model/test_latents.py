"""Philox against the published vectors; normals against their law; every row a function of its id alone."""

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import ClassVar

import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import philox
from pipeline.errors import InputError
from pipeline.model import latents
from tests.conftest import ROOT, environment

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


@pytest.mark.parametrize("law", ["gaussian", "mixture", "smooth4", "fourier"])
def test_a_row_depends_on_its_id_alone(law):
    def draw(ids, shape):
        return latents.draw(law, 7, 3, ids, shape, state={"spectrum": torch.ones(2, 2, *shape)})

    ids = torch.tensor([5, 2**40 + 3, 0, 71, 2**62 - 1])
    together = draw(ids, (1, 5, 5))
    for row, number in enumerate(ids):
        assert torch.equal(draw(number[None], (1, 5, 5))[0], together[row])
    many = draw(torch.arange(3000), (1, 28, 28))
    assert torch.equal(draw(torch.arange(1234, 1240), (1, 28, 28)), many[1234:1240])


def test_seed_round_id_and_stream_all_matter():
    base = philox.normal(1, 1, torch.arange(4), (64,))
    others = [
        philox.normal(2, 1, torch.arange(4), (64,)),
        philox.normal(1 + 2**32, 1, torch.arange(4), (64,)),
        philox.normal(1, 2, torch.arange(4), (64,)),
        philox.normal(1, 1, torch.arange(4) + 4, (64,)),
        philox.normal(1, 1, torch.arange(4) + 2**32, (64,)),
        philox.normal(1, 1, torch.arange(4), (64,), stream=philox.NOISE),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1])) < 0.25


def test_normals_are_normal_and_neighbours_uncorrelated():
    values = philox.normal(0, 0, torch.arange(2000), (101,))
    assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 1e-3
    moments = [float(values.pow(k).mean()) for k in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.05)
    neighbours = torch.corrcoef(torch.stack([values[:-1].flatten(), values[1:].flatten()]))[0, 1]
    columns = torch.corrcoef(torch.stack([values[:, :-1].flatten(), values[:, 1:].flatten()]))[0, 1]
    assert max(abs(float(neighbours)), abs(float(columns))) < 0.01
    assert torch.isfinite(values).all()


def test_uniforms_lie_in_their_interval():
    values = philox.uniform(0, 0, torch.arange(20_000), (3,))
    assert float(values.min()) > 0 and float(values.max()) <= 1
    assert stats.kstest(values.flatten().numpy(), "uniform").pvalue > 1e-3


def test_half_of_the_mixture_is_flat_images_with_noise():
    drawn = latents.draw("mixture", 0, 0, torch.arange(4000), (1, 28, 28)).flatten(1)
    flat, noise = drawn[::2], drawn[1::2]
    assert float(noise.std(1).mean()) == pytest.approx(1, abs=0.01)
    assert float(flat.std(1).min()) >= 0 and float(flat.std(1).max()) < 0.6
    assert stats.kstest(flat.mean(1).numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_smooth_noise_has_few_dimensions():
    drawn = latents.draw("smooth3", 0, 0, torch.arange(500), (1, 24, 24)).flatten(1)
    assert int(torch.linalg.matrix_rank(drawn)) == 9
    assert float(drawn.mean()) == pytest.approx(0, abs=0.05)


def test_the_fourier_law_has_the_spectrum_of_the_data():
    grid = torch.arange(16) / 16 * 2 * torch.pi
    phase = torch.rand(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    images = torch.cos(3 * grid + 6 * phase) * torch.cos(2 * grid)[:, None] + 0.2
    spectrum = latents.measure_spectrum(images)
    drawn = latents.draw("fourier", 0, 0, torch.arange(4000), (1, 16, 16), state={"spectrum": spectrum})
    assert float(drawn.mean()) == pytest.approx(float(images.mean()), abs=0.02)
    power = torch.fft.fft2(drawn).abs().square().mean(0)[0]
    top = power.flatten().topk(9).indices.tolist()
    assert {16 * 2 + 3, 16 * 2 + 13, 16 * 14 + 3, 16 * 14 + 13, 0} <= set(top)


def test_the_spectrum_over_parts_is_that_of_the_whole():
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    halves: list[torch.Tensor] = []
    latents.measure_spectrum(images[:32], lambda moments: halves.append(moments) or moments)
    spectrum = latents.measure_spectrum(images[32:], lambda moments: (moments + halves[0]) / 2)
    torch.testing.assert_close(spectrum, latents.measure_spectrum(images))


def test_bad_ids_and_laws_are_refused():
    with pytest.raises(ValueError, match="2\\*\\*62"):
        philox.normal(0, 0, torch.tensor([-1]), (3,))
    for law in ("cauchy", "smooth", "smooth0", "smoothly"):
        with pytest.raises(InputError, match="gaussian, smooth4, mixture, fourier"):
            latents.check_law(law, (1, 8, 8))
    with pytest.raises(InputError, match="for images"):
        latents.check_law("smooth4", (2,))


WORDS = """
import torch
from pipeline import philox
from pipeline.philox import kernel
ids = torch.tensor([0, 1, 5, 2**40 + 3, 2**61 + 7])
for seed in (0, 1, -1, 2**62 + 3):
    for round, stream, blocks in ((0, 0, 1), (1, 3, 5), (2**32 - 1, 7, 196)):
        drawn = [draw(ids, blocks, seed, round, stream, False) for draw in (philox._drawn, kernel.drawn)]
        assert torch.equal(*drawn), (seed, round, stream)
        normals = [draw(ids, blocks, seed, round, stream, True) for draw in (philox._drawn, kernel.drawn)]
        torch.testing.assert_close(*normals)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_draws_the_same_words():
    env = environment(TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]))
    done = subprocess.run([sys.executable, "-c", WORDS], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_draw_is_one_operation_wherever_it_is_made():
    class Counted(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Counted():
        philox.normal(3, 2, torch.arange(6), (3, 8, 8))
    assert sum(name.startswith("naign.philox") for name in Counted.names) == 1 and len(Counted.names) < 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_draws_the_same_uniform_numbers():
    for shape in ((3, 8, 8), (7,)):
        here, there = (philox.uniform(3, 2, torch.arange(1000), shape, device) for device in ("cpu", "cuda"))
        assert torch.equal(here, there.cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_draws_the_same_latents():
    ids = torch.arange(1000)
    here = latents.draw("mixture", 3, 2, ids, (3, 8, 8))
    there = latents.draw("mixture", 3, 2, ids, (3, 8, 8), "cuda")
    torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-5)


def test_a_share_of_any_law_can_be_flat():
    ids, shape = torch.arange(800), (1, 28, 28)
    usual, found = latents.draw("smooth4", 7, 3, ids, shape), latents.draw("smooth4", 7, 3, ids, shape, flat=0.125)
    flat = ids % 8 == 0
    assert torch.equal(found[~flat], usual[~flat])
    level, spread = found[flat].flatten(1).mean(1), found[flat].flatten(1).std(1)
    assert -1.05 < float(level.min()) < -0.9 and 0.9 < float(level.max()) < 1.05
    assert 0 < float(spread.min()) < 0.05 and 0.45 < float(spread.max()) < 0.55
    some = torch.tensor([3, 16, 2**40])
    assert torch.equal(latents.draw("smooth4", 7, 3, some[:2], shape, flat=0.125), found[some[:2]])
    alone = latents.draw("smooth4", 7, 3, some[2:], shape, flat=0.125)
    assert torch.equal(alone[0], latents.draw("smooth4", 7, 3, some, shape, flat=0.125)[2])
