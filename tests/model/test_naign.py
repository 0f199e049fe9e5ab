"""A saved model is the model, and a folder without one says so."""

from copy import deepcopy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from naign.errors import InputError
from naign.model.holes import continued
from naign.model.naign import FILLING, NAIGN
from naign.model.networks import build_network, recorded_network

DESCRIPTION = {
    "model": {"name": "conv", "width": 4, "depth": 1, "code": 8},
    "shape": [1, 8, 8],
    "prior": {"name": "gaussian"},
}


SPATIAL = {"name": "spatial", "width": 4, "depth": 0, "code": 2}


def make(**more):
    torch.manual_seed(0)
    metadata = {**DESCRIPTION, **more}
    return NAIGN(build_network(recorded_network(metadata["model"]), (1, 8, 8)), metadata)


def test_saving_and_loading_changes_nothing(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    again = NAIGN.from_pretrained(tmp_path)
    assert again.metadata == model.metadata
    assert torch.equal(again.sample(5, seed=3), model.sample(5, seed=3))


def test_a_spectrum_travels_with_the_model(tmp_path):
    made = make()
    metadata = made.metadata | {"prior": {"name": "fourier"}}
    model = NAIGN(made.network, metadata, {"spectrum": torch.rand(2, 2, 1, 8, 8)})
    model.save_pretrained(tmp_path)
    assert torch.equal(NAIGN.from_pretrained(tmp_path).sample(3), model.sample(3))


def test_samples_do_not_depend_on_the_batch_and_times_is_how_often_f_is_applied():
    model = make()
    assert torch.equal(model.latent(torch.arange(7), seed=1)[3:], model.latent(torch.arange(3, 7), seed=1))
    torch.testing.assert_close(model.sample(7, batch=3), model.sample(7, batch=500))
    torch.testing.assert_close(model.sample(7, times=3), model.project(model.sample(7), times=2))


@pytest.mark.parametrize(
    ("x", "times", "problem"),
    [(torch.zeros(2, 1, 8, 8).numpy(), 1, "ndarray"), (torch.zeros(2, 1, 8, 8), -1, "times is -1")],
)
def test_what_f_cannot_be_applied_to_is_refused(x, times, problem):
    with pytest.raises(InputError, match=problem):
        make().project(x, times=times)


def test_energy_is_the_mean_squared_residual():
    model, x = make(), torch.rand(6, 1, 8, 8)
    torch.testing.assert_close(model.energy(x), (model.network(x) - x).square().mean((1, 2, 3)))
    moved = model.network(model.network(x)) - x
    torch.testing.assert_close(model.energy(x, times=2), moved.square().mean((1, 2, 3)))


def test_the_energy_of_what_has_a_gradient_is_a_number_and_results_may_be_changed_in_place():
    model, x = make(), torch.rand(2, 1, 8, 8, requires_grad=True)
    assert not model.energy(x).requires_grad
    for made in (model.project(x), model.latent(torch.arange(2)), model.sample(2)):
        assert not made.is_inference() and made.is_contiguous()


@pytest.mark.parametrize(("n", "batch"), [(-1, 500), (2, 0)])
def test_samples_that_cannot_be_drawn_are_refused(n, batch):
    with pytest.raises(InputError, match=f"n is {n} and batch {batch}"):
        make().sample(n, batch=batch)


def test_on_a_cpu_weights_are_channels_last_and_all_else_the_same(tmp_path):
    shape = (3, 8, 8)
    made = NAIGN(build_network(recorded_network(SPATIAL), shape), DESCRIPTION | {"model": SPATIAL, "shape": [*shape]})
    made.save_pretrained(tmp_path / "once")
    model = NAIGN.from_pretrained(tmp_path / "once")
    assert any(not weight.is_contiguous() for weight in model.network.parameters())
    samples = model.sample(3)
    assert samples.is_contiguous() and model.energy(samples, map=True).is_contiguous()
    usual = deepcopy(model.network).to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(samples, usual(model.latent(torch.arange(3))))
    model.save_pretrained(tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "again")]
    assert files[0] == files[1]


class Flattening(torch.nn.Module):
    """Another package's network, which needs the layout that it was trained with."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.Linear(128, 64)

    def forward(self, x):
        return self.linear(self.conv(x).view(len(x), -1)).view_as(x)


def test_a_network_of_another_package_keeps_its_layout():
    assert NAIGN(Flattening(), DESCRIPTION).sample(3).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("size", [(8, 8), (20, 13)])
def test_holes_are_filled_and_what_is_known_stays(size):
    model, x = make(), torch.rand(3, 1, *size) * 2 - 1
    mask = torch.zeros(size, dtype=torch.bool)
    mask[2:5, 1:7] = True
    made = model.project(x, mask=mask)
    assert torch.equal(made[..., ~mask], x[..., ~mask]) and not (made == x)[..., mask].any()
    step = x.where(~mask, x[..., ~mask].mean(-1)[..., None, None])
    for _ in range(FILLING):
        moved = model.project(step)
        step = torch.where(mask, (moved + continued(x - moved, mask.expand_as(x))).clamp(-1, 1), x)
    torch.testing.assert_close(made, step)
    assert torch.equal(model.project(x.masked_fill(mask, torch.nan), mask=mask), made)
    each = mask.repeat(3, 1, 1, 1) & (torch.arange(3) == 1).view(3, 1, 1, 1)
    assert torch.equal(model.project(x, mask=each)[::2], x[::2])
    assert model.project(x, mask=torch.ones(size, dtype=torch.bool)).isfinite().all()
    for wrong in (mask.float(), mask.numpy(), mask[1:], torch.ones(2, 1, *size, dtype=torch.bool)):
        with pytest.raises(InputError, match="give a bool tensor that broadcasts to"):
            model.project(x, mask=wrong)


@pytest.mark.parametrize("size", [(40, 40), (31, 47)])
def test_what_is_known_is_continued_smoothly_into_a_hole(size):
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, size[0]), torch.linspace(-1, 1, size[1]), indexing="ij")
    planes = torch.stack([torch.full(size, 0.3), rows + columns, rows * columns])[None]  # harmonic
    hole = torch.zeros(size, dtype=torch.bool)
    hole[8:20, 10:26] = True
    made = continued(planes.masked_fill(hole, torch.nan), hole.expand_as(planes))
    assert torch.equal(made[..., ~hole], planes[..., ~hole])
    torch.testing.assert_close(made, planes, atol=0.06, rtol=0)
    assert not continued(planes, torch.ones_like(planes, dtype=torch.bool)).any()


@pytest.mark.parametrize("network", [DESCRIPTION["model"], SPATIAL])
def test_nothing_in_nothing_out(network):
    model = make(model=network)
    assert model.sample(0).shape == (0, 1, 8, 8)
    assert model.project(torch.empty(0, 1, 8, 8)).shape == (0, 1, 8, 8)


def test_values_of_other_precisions_are_converted_and_integers_refused():
    model, x = make(), torch.rand(3, 1, 8, 8, dtype=torch.float64)
    mask = torch.ones(8, 8, dtype=torch.bool).triu()
    assert torch.equal(model.project(x), model.project(x.float()))
    assert torch.equal(model.project(x, mask=mask), model.project(x.float(), mask=mask))
    assert torch.equal(model.energy(x), model.energy(x.float()))
    with pytest.raises(InputError, match=r"floating-point values, images in \[-1, 1\], not torch.uint8: convert"):
        model.project(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run or model at"):
        NAIGN.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no complete checkpoint and no model.safetensors"):
        NAIGN.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="no readable safetensors file"):
        NAIGN.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"the model takes \(1, 8, 8\), .* not \(3, 8, 8\)"):
        make().project(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [1, 12, 12]},
        {"shape": "x"},
        {"prior": {"name": "cauchy"}},
        {"prior": {"name": "fourier"}},
        {"prior": {"name": "flow"}},
        {"prior": {"name": "gaussian", "grid": 4}},
        {"prior": "gaussian"},
        {"prior": {}},
        {"model": {"width": 10**8}},
        {"model": {"name": "conv", "width": 8, "depth": 1, "code": 8}},
    ],
)
def test_a_header_that_lies_is_refused(change, tmp_path):
    model = make()
    model.metadata = {**model.metadata, **change}
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="model.safetensors"):
        NAIGN.from_pretrained(tmp_path)


def test_text_for_a_number_in_a_header_is_named(tmp_path):
    model = make()
    model.metadata["prior"] = {"name": "flow", "autoguidance": "a"}
    model.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match="model.safetensors .*: prior.autoguidance is 'a': it must lie between 0 and 10"
    ):
        NAIGN.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = make()
    next(model.network.parameters()).fill_(float("nan"))
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not finite"):
        NAIGN.from_pretrained(tmp_path)


def test_weights_of_half_precision_are_widened(tmp_path):
    make().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    halved = {name: value.half() for name, value in load_file(file).items()}
    with safe_open(file, framework="pt") as opened:
        save_file(halved, file, metadata=opened.metadata())
    assert NAIGN.from_pretrained(tmp_path).sample(2).dtype == torch.float32
