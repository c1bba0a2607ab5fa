"""The quantiser in stages: its search, what lacks stages, its start and its gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oscar.bottlenecks.residual_vq import ResidualQuantizer


@pytest.fixture
def quantizer() -> ResidualQuantizer:
    torch.manual_seed(0)
    return ResidualQuantizer(dim=12, codebook_dim=3, codebook_size=4, stages=4).eval()


def unit_vectors(count: int, dim: int = 3) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(1)), dim=-1)


def distances(quantizer: ResidualQuantizer, features: Tensor, present: Tensor | None = None) -> Tensor:
    return (quantizer.look_up(quantizer.search(features, present), present) - features).square().sum(-1)


@torch.no_grad()
def test_search_is_near_the_best_of_all_sums(quantizer) -> None:
    features = unit_vectors(200)
    every = torch.tensor(list(itertools.product(range(4), repeat=4)))
    best = torch.cdist(features, quantizer.look_up(every)).amin(1).square()
    found = distances(quantizer, features)
    assert (found >= best - 1e-6).all()
    assert (found < best + 1e-6).float().mean() > 0.8
    residual = features
    for codes in quantizer.codebook:  # one stage after the other, the nearest code of each
        residual = residual - codes[torch.cdist(residual, codes).argmin(1)]
    assert found.mean() < 0.8 * residual.square().sum(-1).mean()


@torch.no_grad()
def test_search_does_not_depend_on_the_batch(quantizer) -> None:
    features = unit_vectors(50)
    whole = quantizer.search(features)
    assert whole.shape == (50, 4) and whole.dtype == torch.int64
    assert torch.equal(whole, torch.cat([quantizer.search(one) for one in features.split(7)]))


@torch.no_grad()
def test_a_stage_that_is_lacking_adds_nothing(quantizer) -> None:
    features = unit_vectors(60)
    present = torch.tensor([[True, True, True, True], [True, True, False, False], [True, False, True, False]])
    present = present.repeat(20, 1)
    indices = quantizer.search(features, present)
    assert not indices[~present].any()
    other = torch.where(present, indices, 3)
    assert torch.equal(quantizer.look_up(indices, present), quantizer.look_up(other, present))
    two = torch.tensor(list(itertools.product(range(4), repeat=2)))
    sums = quantizer.codebook[0][two[:, 0]] + quantizer.codebook[1][two[:, 1]]
    best = torch.cdist(features[1::3], sums).amin(1).square()  # 16 sums: the beam keeps them all
    torch.testing.assert_close(distances(quantizer, features, present)[1::3], best)


def test_start_from_the_first_pass() -> None:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(dim=12, codebook_dim=3, codebook_size=8, stages=2, kmeans_init=True)
    features = unit_vectors(600)
    quantizer.eval()(features)
    assert not quantizer.codebook.any()  # evaluation is no start
    _, _, distance = quantizer.train()(features)
    alone = torch.cdist(features, quantizer.codebook[0]).amin(1).square().mean() / 3
    assert distance < 0.4 * alone
    before = quantizer.codebook.clone()
    quantizer(-features)
    assert torch.equal(before, quantizer.codebook)  # once only
    assert (quantizer.cluster_size > 0).all()


def test_refinement_lowers_the_distance(monkeypatch) -> None:
    found = []
    for rounds in (0, 8):
        torch.manual_seed(0)
        monkeypatch.setattr("oscar.bottlenecks.residual_vq.REFINEMENTS", rounds)
        quantizer = ResidualQuantizer(dim=12, codebook_dim=6, codebook_size=8, stages=4, kmeans_init=True)
        features = unit_vectors(2000, 6)
        quantizer.fit(features)
        found.append(distances(quantizer, features).mean())
    assert found[1] < 0.95 * found[0]


def test_gradient_reaches_codes_and_features(quantizer) -> None:
    features = unit_vectors(100).requires_grad_()
    present = torch.ones(100, 4, dtype=torch.bool)
    present[:, 3] = False
    quantised, indices, _ = quantizer.train()(features, present)
    torch.testing.assert_close(quantised, quantizer.look_up(indices, present))
    quantised.sum().backward()
    torch.testing.assert_close(features.grad, torch.ones_like(features))
    uses = torch.stack([torch.bincount(stage, minlength=4) for stage in indices.t()])
    expected = (uses * torch.tensor([1, 1, 1, 0])[:, None])[..., None].expand(-1, -1, 3).float()
    torch.testing.assert_close(quantizer.codebook.grad, expected)


# Codes that are to cost fewer bits.


def entropy(indices: Tensor, size: int) -> float:
    """Bits per vector, of each stage's codes alone."""
    shares = torch.stack([torch.bincount(stage, minlength=size) for stage in indices.t()]) / len(indices)
    return float(torch.special.entr(shares).sum() / torch.tensor(2.0).log())


@torch.no_grad()
def test_search_finds_the_best_sum_with_penalties(quantizer) -> None:
    quantizer.penalty.copy_(torch.rand(4, 4))
    features = unit_vectors(200)
    every = torch.tensor(list(itertools.product(range(4), repeat=4)))
    spent = quantizer.penalty[torch.arange(4), every].sum(1)
    best = (torch.cdist(features, quantizer.look_up(every)).square() + spent).amin(1)
    indices = quantizer.search(features)
    found = distances(quantizer, features) + quantizer.penalty[torch.arange(4), indices].sum(1)
    assert (found >= best - 1e-5).all()
    assert (found < best + 1e-5).float().mean() > 0.8
    present = torch.tensor([True, False, True, False]).expand(200, 4)
    assert not quantizer.search(features, present)[~present].any()


@torch.no_grad()
def test_a_bit_is_worth_more_and_fewer_are_spent() -> None:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(dim=12, codebook_dim=6, codebook_size=8, stages=4, kmeans_init=True)
    features = F.normalize(unit_vectors(3000, 6) * torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25, 0.1]), dim=-1)
    quantizer.fit(features)
    before = quantizer.codebook.clone()
    bits, errors = [entropy(quantizer.search(features), 8)], [distances(quantizer, features).mean()]
    for strength in (0.1, 0.3, 0.5):
        quantizer.codebook.copy_(before)
        quantizer.constrain(features, strength)
        bits.append(entropy(quantizer.search(features), 8))
        errors.append(distances(quantizer, features).mean())
    assert bits[1] > bits[2] > bits[3] and bits[2] < 0.95 * bits[0]
    assert errors[1] < errors[2] < errors[3]
    # Better than the same codes with what the search alone can do: that is what fitting them is for.
    fitted = quantizer.codebook.clone()
    quantizer.codebook.copy_(before)
    costs = distances(quantizer, features) + quantizer.penalty[torch.arange(4), quantizer.search(features)].sum(1)
    quantizer.codebook.copy_(fitted)
    ours = distances(quantizer, features) + quantizer.penalty[torch.arange(4), quantizer.search(features)].sum(1)
    assert ours.mean() < costs.mean()
