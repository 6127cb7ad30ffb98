"""sigma^L at other depths, and models built that deep."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import isograd
from gallery.nets import mlp, orthogonal
from isograd.extrapolation import extrapolate

X = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
Y = torch.randint(10, (64,), generator=torch.Generator().manual_seed(2))
TOKENS = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(3))


def loss(model: nn.Module) -> Tensor:
    return functional.cross_entropy(model(X), Y)


def chain(gain: float, depth: int) -> nn.Module:
    return mlp(nn.Identity, depth, 64, orthogonal(gain))


def test_gains_that_are_all_alike_carry_exactly() -> None:
    found = extrapolate(chain(0.9, 10), loss, [50], build=lambda d: chain(0.9, d), depth=10)
    assert found.law.sigma == pytest.approx(0.9, rel=1e-4)
    assert found.law.r2 == pytest.approx(1.0, abs=1e-6)
    (deeper,) = found.deeper
    assert deeper.layers == 50
    assert deeper.measured == pytest.approx(50 * math.log10(0.9), abs=1e-3)
    assert deeper.decades == pytest.approx(deeper.measured, abs=2e-3)
    assert "one sigma describes the chain" in repr(found)


def test_a_sigmoid_chain_is_foretold_within_its_error() -> None:
    torch.manual_seed(0)
    found = extrapolate(
        mlp(nn.Sigmoid, 10, 64, None),
        loss,
        [20, 60],
        build=lambda d: mlp(nn.Sigmoid, d, 64, None),
        depth=10,
    )
    for deeper in found.deeper:
        assert deeper.measured < -15
        assert abs(deeper.off) < 3


def test_a_transformer_is_a_config_away_and_no_one_sigma_describes_it() -> None:
    import transformers

    config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=64)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).train()
    state = torch.get_rng_state()
    found = extrapolate(model, lambda m: m(input_ids=TOKENS, labels=TOKENS).loss, [2, 9])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.n_layer == 3
    assert found.depth == 3
    assert [d.layers for d in found.deeper] == [4, 18]
    assert found.law.r2 < 0.5
    assert "no one sigma describes the chain" in repr(found)
    nine = found.deeper[1]
    assert abs(nine.measured - nine.decades) > 1  # it grows by a root of depth and not like sigma^L


def test_without_a_way_to_build_the_law_alone_is_told() -> None:
    found = extrapolate(chain(0.9, 5), loss, [50])
    (deeper,) = found.deeper
    assert math.isnan(deeper.measured)
    assert json.loads(found.to_json())["deeper"][0]["measured"] is None
    assert isograd.extrapolate is extrapolate
