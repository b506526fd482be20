"""Which parameters are frozen is known by their names, before an actor starts."""

from __future__ import annotations

import pytest

from rlsys.config.load import apply_overrides
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.plan.frozen import check_frozen
from rlsys.plan.skeleton import skeleton_of
from rlsys.train.frozen import freeze


def refused(*words: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_frozen(apply_overrides(Config(), ["model.path=tiny", *words]))
    assert caught.value.what == "train.frozen"
    return caught.value


def test_patterns_match_names_and_a_tied_weight_by_either_of_its_names():
    model = skeleton_of("tiny")
    freeze(model, ["lm_head.*", "model.layers.1.*"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        name for name, _ in model.named_parameters() if name.startswith("model.layers.1.") or "embed_tokens" in name
    }
    assert "model.embed_tokens.weight" in frozen and not any("layers.10" in name for name in frozen)


def test_a_pattern_that_matches_nothing_is_refused_and_a_real_name_is_shown():
    error = refused("train.frozen=[model.embed_tokens*, model.layer.0.*]")
    assert error.got.startswith("'model.layer.0.*'") and "model.embed_tokens.weight" in error.wanted


def test_to_freeze_everything_is_refused():
    assert "match all" in refused("train.frozen=[model.layers.*, '*norm*', lm_head*]").got


def test_frozen_layers_below_adapters_are_refused():
    assert "train.lora" in refused("train.frozen=[model.layers.0.*]", "train.lora={r: 4}").got


def test_what_can_be_trained_is_let_through():
    check_frozen(apply_overrides(Config(), ["model.path=tiny", "train.frozen=[model.layers.0.*]"]))
    check_frozen(apply_overrides(Config(), ["model.path=tiny", "train.lora={r: 4}"]))
