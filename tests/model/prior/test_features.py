"""Features of codes, which condition a flow without labels."""

from copy import deepcopy
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.testing import assert_close

from naign.model.prior.features import Features
from naign.model.prior.flow import Flow, FlowConfig
from tests.model.prior.ranks import fit_on_ranks, in_memory
from tests.refused import refused

CONFIG = FlowConfig(
    width=64,
    depth=2,
    passes=24,
    batch=128,
    features=0.7,
)


def make_codes(count=1024):
    """Codes of two kinds, a quarter and three quarters, around (-3, 0) and (3, 0); and their kinds."""
    kinds = (torch.arange(count) % 4 > 0).long()
    codes = 0.2 * torch.randn(count, 2)
    codes[:, 0] += 6.0 * kinds - 3
    return codes, kinds


def build(config=CONFIG, shape=(2,)):
    return Flow(config, shape, seed=3).requires_grad_(False)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 7, 5), (3, 2, 2)])
def test_textures_are_told_apart_wherever_they_lie(shape):
    kinds = torch.arange(600) % 2
    rows = torch.arange(shape[1])[:, None] + torch.arange(600)[:, None, None, None] // 2
    stripes = (rows % 2 * 2.0 - 1).expand(600, *shape)
    codes = torch.where(kinds.view(-1, 1, 1, 1) > 0, stripes, stripes[:, :, :1]) + 0.1 * torch.randn(600, *shape)
    features = Features(shape)
    features.fit([codes], in_memory(codes), 0, 0.7)
    found = features(codes)
    assert_close(found.square().mean(), torch.tensor(1.0))
    again = Features(shape)
    again.load_state_dict(features.state_dict())
    assert_close(again(codes[:50]), found[:50])
    if shape[1] == 8:  # elsewhere quarters have an odd number of rows: their averages tell where a stripe lies
        distances = torch.cdist(found, found).fill_diagonal_(torch.inf)
        assert torch.equal(kinds[distances.argmin(1)], kinds)


def test_samples_are_like_the_training_images_whose_features_they_draw():
    codes, kinds = make_codes()
    prior = build(replace(CONFIG, passes=72))
    list(prior.fit(in_memory(codes)))
    ids = torch.arange(2000)
    drawn = prior.draw(0, 0, ids, "cpu")
    chosen = prior.features.choose(0, 0, ids, "cpu")
    of_large = prior.features(prior.whiten(codes[kinds == 1])).mean(0)
    large = (chosen * of_large).sum(1) > 0
    assert float(large.float().mean()) == pytest.approx(0.75, abs=0.05)
    assert float(((drawn[:, 0] > 0) == large).float().mean()) > 0.9
    assert float((drawn[:, 0] > 0).float().mean()) == pytest.approx(0.75, abs=0.05)
    some = [70, 3]
    assert_close(prior.draw(0, 0, ids[some], "cpu"), drawn[some], atol=1e-5, rtol=1e-4)


def test_a_fit_with_features_goes_on_bit_for_bit():
    codes, _ = make_codes()
    config = replace(CONFIG, passes=2, guidance=1.0)
    whole = build(config)
    total = len(list(whole.fit(in_memory(codes))))
    stopped = build(config)
    list(islice(stopped.fit(in_memory(codes)), 5))
    resumed = build(config)
    resumed.load_training_state(deepcopy(stopped.training_state()))
    assert len(list(resumed.fit(in_memory(codes)))) == total - 5
    found = resumed.training_state()
    for name, value in whole.training_state().items():
        assert torch.equal(value, found[name]), name


def test_ranks_find_the_same_features():
    codes, _ = make_codes()
    config = replace(CONFIG, passes=1)
    alone = build(config)
    list(alone.fit(in_memory(codes)))
    several = [build(config) for _ in range(3)]
    fit_on_ranks(several, codes)
    for prior in several:
        assert_close(prior.features.state_dict(), alone.features.state_dict())
        assert_close(prior.velocity.state_dict(), alone.velocity.state_dict(), atol=1e-4, rtol=1e-3)


def test_guidance_leads_to_features():
    codes, kinds = make_codes()
    prior = build(replace(CONFIG, passes=72, guidance=1.0))
    list(prior.fit(in_memory(codes)))
    rare = prior.features(prior.whiten(codes[kinds == 0])).mean(0).expand(500, -1)
    noise = torch.randn(500, 2)
    guided = prior.solve(noise, rare)
    prior.config = replace(prior.config, guidance=0.0)
    plain = prior.solve(noise, rare)
    assert (guided[:, 0] < 0).float().mean() > (plain[:, 0] < 0).float().mean() - 0.02
    assert not torch.allclose(guided, plain, atol=1e-3)


def test_what_does_not_go_together_is_refused():
    with refused("prior.classes and prior.features exclude each other"):
        FlowConfig(classes=True, features=0.7).check()
    with refused("prior.features are found from 1,000 images or more, and these are 999"):
        CONFIG.check_codes(999, (2,))
    alike = torch.ones(64, 2)
    with refused("the codes of all images are the same"):
        list(build().fit(in_memory(alike)))
