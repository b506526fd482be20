"""Which rows can be shared is known before an actor starts; and what attention does with packed ones."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from rlsys.config.load import apply_overrides
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.plan.sequence_parallel import check_sequence_parallel
from rlsys.train.sequence_parallel import packed_attention

LLAMA = {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 2}


def config_of(tmp_path, *overrides: str, **keys: object) -> Config:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **keys}))
    overrides = (f"model.path={tmp_path}", "train.sequence_parallel=2", *overrides)
    return apply_overrides(Config(), ["algo.advantage={name: grpo}", *overrides])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_heads_that_divide_are_shared(tmp_path, parts):
    check_sequence_parallel(config_of(tmp_path, f"train.sequence_parallel={parts}"))


@pytest.mark.parametrize(
    ("overrides", "keys", "got"),
    [
        (["train.sequence_parallel=5"], {}, "12 attention heads"),
        (["train.sequence_parallel=3"], {}, "12 attention heads and 2 key-value heads"),
        (["train.tensor_parallel=2"], {}, "train.tensor_parallel=2 beside it"),
        (["train.expert_parallel=2", "train.ranks=2"], {}, "train.expert_parallel=2 beside it"),
        (["algo.advantage={name: gae}"], {}, "a critic"),
        ([], {"model_type": "mistral", "sliding_window": 16}, "a model (mistral) with sliding attention"),
        ([], {"model_type": "gemma2", "sliding_window": None}, "a model (gemma2) with capped attention"),
    ],
)
def test_what_cannot_share_its_rows_is_refused_with_the_reason(tmp_path, overrides, keys, got):
    config = config_of(tmp_path, *overrides, **keys)
    with pytest.raises(ConfigError) as caught:
        check_sequence_parallel(config)
    assert caught.value.what == f"train.sequence_parallel={config.train.sequence_parallel}"
    assert caught.value.got.startswith(got)


@pytest.mark.parametrize("lengths", [(9,), (4, 5), (1, 6, 2)])
def test_samples_in_a_row_attend_to_themselves_alone(lengths):
    torch.manual_seed(0)
    module = torch.nn.Identity()
    query, key, value = (torch.randn(1, 2, sum(lengths), 4) for _ in range(3))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    got, _ = packed_attention(module, query, key, value, None, position_ids=positions)
    samples = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    alone = [F.scaled_dot_product_attention(*sample, is_causal=True) for sample in samples]
    torch.testing.assert_close(got, torch.cat(alone, dim=2).transpose(1, 2))
