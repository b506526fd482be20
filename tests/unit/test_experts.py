"""The load of experts, by hand: two layers, four experts, two experts a token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rlsys.errors import ConfigError
from rlsys.train.experts import Routers, load_metrics, load_of

EVEN = torch.zeros(3, 4)  # logits: every expert has probability 1/4
LEANING = torch.tensor([[math.log(3.0), 0.0, 0.0, 0.0]]).repeat(3, 1)  # 1/2, 1/6, 1/6, 1/6
MASK = torch.tensor([True, True, False])  # the third token fills a row up
LAYERS = [
    (EVEN, torch.tensor([[0, 1], [2, 3], [0, 1]])),  # each expert once
    (LEANING, torch.tensor([[0, 1], [0, 1], [2, 3]])),  # two experts twice, two never
]


def test_choices_and_probabilities_are_summed_over_the_tokens_of_samples():
    load = load_of(LAYERS, MASK)
    assert load.num_tokens == 2
    assert load.choices.tolist() == [[1, 1, 1, 1], [2, 2, 0, 0]]
    torch.testing.assert_close(load.probabilities, torch.tensor([[0.5] * 4, [1.0, 1 / 3, 1 / 3, 1 / 3]]))
    entropy = 0.5 * math.log(2) + 0.5 * math.log(6)  # of one half and three sixths
    assert float(load.entropy) == pytest.approx(2 * math.log(4) + 2 * entropy)


def test_metrics_are_those_of_the_busiest_and_the_idle():
    metrics = load_metrics(load_of(LAYERS, MASK))
    assert metrics["router/max_load"] == pytest.approx(2.0)  # half of the second layer's choices, times 4 experts
    assert metrics["router/dead_experts"] == 2.0
    # 4 x sum of share x probability: 4 x 4 x 1/2 x 1/4 = 2 where all are alike, 4 x (1 x 1/2 + 1 x 1/6) = 8/3
    assert metrics["router/balance_loss"] == pytest.approx((2 + 8 / 3) / 2)
    assert metrics["router/entropy"] == pytest.approx((math.log(4) + 0.5 * math.log(12)) / 2)


def test_a_load_adds_up():
    one, other = load_of(LAYERS, MASK), load_of(LAYERS, ~MASK)
    torch.testing.assert_close(one.flat() + other.flat(), load_of(LAYERS, torch.ones(3, dtype=torch.bool)).flat())


def test_a_dense_model_has_no_load_and_none_to_balance():
    routers = Routers(nn.Linear(2, 2), coef=0.0, device="cpu")
    assert routers.metrics() == {} and routers.balance_loss() == 0.0
    with pytest.raises(ConfigError) as caught:
        Routers(nn.Linear(2, 2), coef=0.1, device="cpu")
    assert caught.value.what == "train.router_aux_coef"
