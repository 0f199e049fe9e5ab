"""The defects and scores of benchmarks/maps.py on cases with known answers."""

from types import ModuleType

import pytest
import torch
from sklearn.decomposition import PCA


@pytest.fixture(scope="module")
def maps(benchmarks: None) -> ModuleType:
    import maps

    return maps


def test_what_does_not_change_is_no_defect(maps):
    black = torch.full((60, 1, 28, 28), -1.0)
    made = maps.defects(black, black, black + 2, seed=0)
    share = {kind: changed.flatten(1).sum(1) for kind, (_, changed) in made.items()}
    assert not any(share[kind].any() for kind in ("patch of another image", "blurred square", "dead rows"))
    assert (share["patch of another set"] == maps.PATCH**2).all()
    images, changed = made["scratch"]
    assert torch.equal(changed, (images[:, 0] + 1) > maps.CHANGED)
    seen = share["scratch"][share["scratch"] > 0]  # a scratch of nearly black is not
    assert len(seen) > 50 and seen.min() > 12 and seen.max() < 3 * 28


def test_a_blurred_square_lies_within_the_image(maps):
    images = torch.rand(60, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    changed = (maps.blurred(images, torch.Generator().manual_seed(0)) != images).any(1)
    assert (changed.any(2).sum(1) == maps.PATCH).all() and (changed.any(1).sum(1) == maps.PATCH).all()
    assert (changed.sum((1, 2)) == maps.PATCH**2).all()


def test_a_map_of_what_changed_is_perfect_and_a_flat_one_chance(maps):
    images = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = maps.defects(images, images.flip(0), -images, seed=0)
    for damaged, changed in made.values():
        one = {"kind": (damaged, changed)}
        assert maps.measured(lambda x: (x - images).abs().amax(1), one)["kind"][0] == 1
        assert maps.measured(lambda x: torch.zeros(20, 28, 28), one) == {"kind": [0.5, 0.5], "mean": [0.5, 0.5]}


def test_the_residual_of_a_pca_is_what_its_components_lack(maps):
    train = torch.randn(100, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 13)
    pca, images = PCA(5).fit(train.numpy()), train[:7].view(7, 3, 2, 2)
    kept = torch.from_numpy(pca.inverse_transform(pca.transform(train[:7].numpy())))
    expected = (images - kept.view_as(images)).square().mean(1)
    torch.testing.assert_close(maps.pca_map(pca, 5)(images), expected)
    mean = (images - train.mean(0).view(3, 2, 2)).square().mean(1)
    torch.testing.assert_close(maps.pca_map(pca, 0)(images), mean)
