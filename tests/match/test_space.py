"""The distance is the one defined, and an image's place in it does not depend on what it comes with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.match.space import ROWS, SpaceConfig, check_space, embed
from pipeline.model.encoders import FOLDER
from pipeline.training.prepare import open_features

SHAPE = (1, 8, 8)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoder(**weights):
    config = SpaceConfig(features=1.0, encoder="digits-cnn64", **weights)
    return config, open_features(config, SHAPE, torch.device("cpu"))


def test_the_default_is_the_pixels_themselves():
    images = draw(0, 5, 3, 4, 4)
    assert torch.equal(embed(images, SpaceConfig(), number=3), images.flatten(1))


@settings(max_examples=30, deadline=None)
@given(
    weights=st.tuples(*[st.sampled_from([0.0, 0.1, 1.0, 30.0])] * 2).filter(any),
    count=st.integers(0, 5),
)
def test_the_squared_distance_is_the_weighted_sum_of_mean_squares(weights, count):
    def features(images):
        return images.flatten(1)[:, :7].sin()

    pixels, learned = weights
    config = SpaceConfig(pixels=pixels, features=learned, encoder="any" if learned else "")
    images, others = draw(1, count, 2, 6, 6), draw(2, count, 2, 6, 6)
    found = (embed(images, config, features) - embed(others, config, features)).square().sum(1)

    def mean(part):
        return (part(images) - part(others)).square().flatten(1).mean(1)

    expected = pixels * mean(lambda x: x) + learned * mean(features)
    torch.testing.assert_close(found, 72 * expected, rtol=1e-4, atol=1e-4)


def by_place(images):
    """Features that round by a row's place and the number of rows, as matrix products may."""
    return images.flatten(1)[:, :3] * (1 + 1e-6 * torch.arange(len(images))[:, None]) + 1e-6 * len(images)


@pytest.mark.parametrize("features", ["digits-cnn64", by_place])
def test_an_embedding_does_not_depend_on_the_batch(features):
    config, shipped = encoder(pixels=2.0)
    features = features if callable(features) else shipped
    images = draw(3, 700, *SHAPE)
    whole = embed(images, config, features)
    for edges in ((0, 1, 2, 257, 700), (0, 233, 466, 700), (0, ROWS, 2 * ROWS, 700)):
        parts = [
            embed(images[start:stop], config, features, number=start)
            for start, stop in zip(edges, edges[1:], strict=False)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_the_encoder_may_be_a_file(tmp_path):
    config, features = encoder()
    path = str(FOLDER / "digits-cnn64.safetensors")
    same = open_features(SpaceConfig(features=1.0, encoder=path), SHAPE, torch.device("cpu"))
    images = draw(4, 10, *SHAPE)
    assert torch.equal(embed(images, config, same), embed(images, config, features))
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    for name, message in (
        ("nowhere/x.safetensors", "nowhere/x.safetensors is no encoder .*No such file"),
        (str(tmp_path / "bad.safetensors"), "is no encoder as .*train_encoder"),
        ("mnist-cnn64", r"match.space.encoder 'mnist-cnn64' reads \(1, 28, 28\), these images are \(1, 8, 8\)"),
    ):
        with pytest.raises(InputError, match=message):
            open_features(SpaceConfig(features=1.0, encoder=name), SHAPE, torch.device("cpu"))


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ({"pixels": -1.0}, "match.space.pixels"),
        ({"features": float("nan")}, "match.space.features"),
        ({"features": float("inf"), "encoder": "pixels"}, "match.space.features"),
        ({"pixels": 0.0}, "match.space.pixels and .features are both 0"),
        ({"features": 1.0}, "match.space.encoder"),
        ({"encoder": "pixels"}, "match.space.features"),
    ],
)
def test_nonsense_is_refused(setting, key):
    with pytest.raises(InputError, match=key):
        SpaceConfig(**setting)


def test_a_space_that_does_not_fit_the_data_is_refused():
    check_space(SpaceConfig(), (2,))
    check_space(SpaceConfig(features=1.0, encoder="pixels"), SHAPE)
    with pytest.raises(InputError, match="match.space.features is for images, these are points"):
        check_space(SpaceConfig(features=1.0, encoder="pixels"), (2,))
