"""A saved model is the model, and a folder without one says so."""

from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from naign.model.holes import continued
from naign.model.naign import FILLING, NAIGN
from tests.model.made import CONV, assert_near, make_model, wrapped
from tests.refused import refused

SPATIAL = {"name": "spatial", "width": 4, "depth": 0, "code": 2}


def refuse(place, said):
    with refused(said):
        NAIGN.from_pretrained(place)


def test_samples_do_not_depend_on_the_batch_and_times_is_how_often_f_is_applied():
    model = make_model()
    samples = model.sample(7)
    latents = model.latent(torch.arange(7), seed=1)
    assert torch.equal(model.latent(torch.arange(3, 7), seed=1), latents[3:])
    assert_close(model.sample(7, times=3), model.project(samples, times=2))
    model._rows = 3
    assert_close(model.sample(7), samples)


def test_large_images_are_computed_in_small_batches():
    for side, rows in (
        (8, 500),
        (256, 8),
        (1024, 1),
    ):
        assert make_model(shape=(1, side, side))._rows == rows


@pytest.mark.parametrize(
    "x, times, said",
    [
        (torch.zeros(2, 1, 8, 8).numpy(), 1, "takes floating-point tensors"),
        (
            torch.zeros(2, 1, 8, 8).byte(),
            1,
            r"images in \[-1, 1\], not torch.uint8: convert",
        ),
        (torch.zeros(2, 1, 8, 8), -1, "times is -1"),
        (torch.zeros(2, 3, 8, 8), 1, r"the model takes \(1, 8, 8\), .* not \(3, 8, 8\)"),
    ],
)
def test_what_f_cannot_be_applied_to_is_refused(x, times, said):
    with refused(said):
        make_model().project(x, times=times)


def test_energy_is_the_mean_squared_residual():
    model = make_model()
    x = torch.rand(6, 1, 8, 8)
    moved = x
    for times in (1, 2):
        moved = model.network(moved)
        expected = (moved - x).square().mean((1, 2, 3))
        assert_close(model.energy(x, times=times), expected)
    assert torch.equal(model.energy(x.double()), model.energy(x))


def test_results_are_without_a_gradient_and_may_be_changed_in_place():
    model = make_model()
    x = torch.rand(2, 1, 8, 8).requires_grad_()
    latents = model.latent(torch.arange(2))
    for made in (latents, model.energy(x), model.project(x), model.sample(2)):
        assert not made.requires_grad
        assert not made.is_inference()
        assert made.is_contiguous()


def test_on_a_cpu_weights_are_channels_last_and_all_else_the_same(tmp_path):
    make_model(SPATIAL, (3, 8, 8)).save_pretrained(tmp_path / "once")
    model = NAIGN.from_pretrained(tmp_path / "once")
    assert any(not weight.is_contiguous() for weight in model.network.parameters())
    samples = model.sample(3)
    assert samples.is_contiguous()
    usual = deepcopy(model.network).to(memory_format=torch.contiguous_format)
    assert_close(samples, usual(model.latent(torch.arange(3))))
    model.save_pretrained(tmp_path / "again")
    file = "model.safetensors"
    assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


class Flattening(torch.nn.Module):
    """Another package's network, which needs the layout that it was trained with."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3, padding=1)
        self.linear = torch.nn.Linear(128, 64)

    def forward(self, x):
        flat = self.conv(x).view(len(x), -1)
        return self.linear(flat).view_as(x)


def test_a_network_of_another_package_keeps_its_layout():
    model = wrapped(Flattening(), (1, 8, 8))
    assert len(model.sample(3)) == 3


@pytest.fixture(params=[(8, 8), (20, 13)])
def holed(request):
    """A model, images of two sizes, and a hole in them."""
    mask = torch.zeros(request.param, dtype=torch.bool)
    mask[2:5, 1:7] = True
    return make_model(), torch.rand(3, 1, *request.param) * 2 - 1, mask


def test_holes_are_filled_and_what_is_known_stays(holed):
    model, x, mask = holed
    made = model.project(x, mask=mask)
    assert torch.equal(made[..., ~mask], x[..., ~mask])
    step = x.where(~mask, x[..., ~mask].mean(-1)[..., None, None])
    for _ in range(FILLING):
        moved = model.project(step)
        filled = moved + continued(x - moved, mask.expand_as(x))
        step = torch.where(mask, filled.clamp(-1, 1), x)
    assert_close(made, step)
    assert torch.equal(model.project(x.masked_fill(mask, torch.nan), mask=mask), made)
    assert torch.equal(model.project(x.double(), mask=mask), made)


def test_a_mask_may_differ_by_image_and_must_fit(holed):
    model, x, mask = holed
    second = (torch.arange(3) == 1).view(3, 1, 1, 1)
    assert torch.equal(model.project(x, mask=mask & second)[::2], x[::2])
    assert model.project(x, mask=torch.ones_like(mask)).isfinite().all()
    too_many = mask.expand(2, 1, *mask.shape)
    for wrong in (mask.float(), mask.numpy(), mask[1:], too_many):
        with refused("give a bool tensor that broadcasts to"):
            model.project(x, mask=wrong)


def test_what_is_known_is_continued_smoothly_into_a_hole():
    size = (31, 47)
    down = torch.linspace(-1, 1, 31)[:, None]
    across = torch.linspace(-1, 1, 47)
    planes = torch.stack([torch.full(size, 0.3), down + across, down * across])[None]  # harmonic
    hole = torch.zeros(size, dtype=torch.bool)
    hole[8:20, 10:26] = True
    made = continued(planes.masked_fill(hole, torch.nan), hole.expand_as(planes))
    assert torch.equal(made[..., ~hole], planes[..., ~hole])
    assert_near(made, planes, 0.06)
    assert not continued(planes, torch.ones_like(planes, dtype=torch.bool)).any()


def test_nothing_in_nothing_out():
    model = make_model()
    assert model.sample(0).shape == (0, 1, 8, 8)
    with refused("n is -1"):
        model.sample(-1)
    assert model.project(torch.empty(0, 1, 8, 8)).shape == (0, 1, 8, 8)


def test_what_is_no_model_is_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path, "no readable safetensors file")
    save_file({"weight": torch.zeros(1)}, file)
    refuse(tmp_path, "was not written by this program")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"shape": [1, 12, 12]}, ""),
        ({"shape": "x"}, ""),
        ({"prior": "gaussian"}, ""),
        ({"prior": {"name": "flow", "guidance": "a"}}, "prior.guidance is 'a': it must lie between"),
        ({"model": CONV | {"width": 10**8}}, ""),
        ({"config": {"objective": 5}}, ""),
        ({"prior": {"name": "gaussian"}, "fitted": "x"}, ""),
    ],
)
def test_a_header_that_lies_is_refused(change, said, tmp_path):
    model = make_model()
    model.metadata = model.metadata | change
    model.save_pretrained(tmp_path)
    refuse(tmp_path, f"model.safetensors does not hold the model that its header describes: .*{said}")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = make_model()
    next(model.network.parameters()).fill_(float("nan"))
    model.save_pretrained(tmp_path)
    refuse(tmp_path, "not finite")
