"""The shift by one, and the DeepSpeed configuration."""

import pytest
import torch

from rlsys.config.schema import Row, TrainSection
from rlsys.errors import ConfigError
from rlsys.train import logprobs
from rlsys.train.deepspeed_config import deepspeed_config
from rlsys.train.logprobs import token_logprobs
from rlsys.train.optimizers import deepspeed_entry

TOKEN_IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
POSITION_IDS = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])


def reference(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Token by token: log softmax of the logits before it; 0 where a segment begins."""
    table = torch.log_softmax(logits.double() / temperature, dim=-1)
    rows = []
    for row in range(2):
        begins = [int(POSITION_IDS[row, t]) == 0 for t in range(6)]
        rows.append(
            torch.stack([table.new_zeros(()) if begins[t] else table[row, t - 1, TOKEN_IDS[row, t]] for t in range(6)])
        )
    return torch.stack(rows)


@pytest.mark.parametrize("chunk_elements", [1 << 23, 30])  # all at once, and three rows at a time
def test_token_logprobs_and_their_gradient_equal_log_softmax_at_temperature(monkeypatch, chunk_elements):
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    values = 3 * torch.randn(2, 6, 10)
    weights = torch.randn(2, 6)
    logits, plain = values.clone().requires_grad_(), values.clone().requires_grad_()
    result = token_logprobs(logits, TOKEN_IDS, POSITION_IDS, temperature=0.7)
    wanted = reference(plain, 0.7)
    torch.testing.assert_close(result.logprobs, wanted.float(), atol=1e-6, rtol=1e-6)
    (result.logprobs * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(logits.grad, plain.grad, atol=1e-6, rtol=1e-6)


def test_entropy_is_that_of_the_distribution_the_token_was_drawn_from():
    logits = torch.full((1, 3, 4), 0.0)
    logits[0, 1] = torch.tensor([0.0, 0.0, -1e4, -1e4])
    result = token_logprobs(logits, torch.tensor([[0, 1, 1]]), torch.arange(3)[None], temperature=0.5)
    torch.testing.assert_close(result.entropy, torch.tensor([[0.0, 4.0, 2.0]]).log().clamp(min=0.0))
    assert not result.entropy.requires_grad


@pytest.mark.parametrize("chunk_elements", [1 << 23, 30])
def test_candidates_and_entropy_carry_the_gradient_of_their_formulas(monkeypatch, chunk_elements):
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    values, candidates = 3 * torch.randn(2, 6, 10), torch.randint(0, 10, (2, 6, 3))
    of_tokens, of_entropy, of_candidates = torch.randn(2, 6), torch.randn(2, 6), torch.randn(2, 6, 3)
    logits, plain = values.clone().requires_grad_(), values.double().requires_grad_()
    result = token_logprobs(
        logits, TOKEN_IDS, POSITION_IDS, temperature=0.7, candidate_ids=candidates, entropy_gradient=True
    )
    table = torch.log_softmax(plain / 0.7, dim=-1).roll(1, dims=1)  # row t - 1 speaks of token t
    begins = POSITION_IDS == 0
    entropy = -(table.exp() * table).sum(-1).masked_fill(begins, 0.0)
    looked_up = table.gather(2, candidates).masked_fill(begins[..., None], 0.0)
    torch.testing.assert_close(result.entropy, entropy.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.candidate_logprobs, looked_up.float(), atol=1e-5, rtol=1e-5)
    ((result.logprobs * of_tokens).sum() + (result.entropy * of_entropy).sum()).add(
        (result.candidate_logprobs * of_candidates).sum()
    ).backward()
    wanted = (reference(plain, 0.7) * of_tokens).sum() + (entropy * of_entropy).sum()
    (wanted + (looked_up * of_candidates).sum()).backward()
    torch.testing.assert_close(logits.grad, plain.grad.float(), atol=1e-5, rtol=1e-5)


def test_bfloat16_logits_give_float32_logprobs():
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 10).bfloat16().requires_grad_()
    result = token_logprobs(logits, TOKEN_IDS, POSITION_IDS, temperature=1.0)
    assert result.logprobs.dtype == torch.float32
    torch.testing.assert_close(result.logprobs, reference(logits, 1.0).float(), atol=1e-5, rtol=1e-5)
    result.logprobs.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_section_becomes_a_deepspeed_config():
    train = TrainSection(zero_stage=2, lr=3e-4, betas=(0.8, 0.9), weight_decay=0.1, max_grad_norm=0.5)
    config = deepspeed_config(train, device="cpu")
    assert config["zero_optimization"]["stage"] == 2
    assert config["gradient_clipping"] == 0.5
    params = {"lr": 3e-4, "betas": [0.8, 0.9], "weight_decay": 0.1, "eps": 1e-8}
    assert config["optimizer"] == {"type": "AdamW", "params": {"torch_adam": True, **params}}
    assert deepspeed_config(train, device="cuda")["optimizer"]["params"] == params


def test_what_the_user_passes_is_merged():
    passed = {
        "zero_optimization": {"stage3_param_persistence_threshold": 0, "stage": 3},
        "bf16": {"immediate_grad_update": True},
    }
    config = deepspeed_config(TrainSection(zero_stage=3, dtype="bfloat16", deepspeed=passed), device="cpu")
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert config["zero_optimization"]["reduce_bucket_size"] > 0
    assert config["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert passed["zero_optimization"] == {"stage3_param_persistence_threshold": 0, "stage": 3}  # left as it was


def test_what_is_offloaded_waits_on_the_cpu_and_its_adam_is_the_compiled_one():
    config = deepspeed_config(TrainSection(zero_stage=3, offload="optimizer+params"), device="cpu")
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert config["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert "torch_adam" not in config["optimizer"]["params"]
    config = deepspeed_config(TrainSection(zero_stage=2, offload="optimizer"), device="cuda")
    assert "offload_param" not in config["zero_optimization"]


def test_an_optimizer_is_handed_the_keys_that_are_its_own():
    entries = {
        name: deepspeed_entry(TrainSection(optimizer=Row(name=name), lr=0.5), device="cuda")
        for name in ("adam", "sgd", "lion", "muon")
    }
    common = {"lr": 0.5, "weight_decay": 0.0}
    betas = {"betas": [0.9, 0.999]}
    plain = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
    assert entries["adam"] == {"type": "Adam", "params": {**common, **betas, "eps": 1e-8, "adam_w_mode": False}}
    assert entries["sgd"] == {"type": "SGD", "params": {**common, **plain}}
    assert entries["lion"] == {"type": "Lion", "params": {**common, **betas}}
    assert entries["muon"] == {"type": "Muon", "params": {**common, **betas, "momentum": 0.95, "eps": 1e-8}}
    row = Row(name="muon", adam_lr=0.1)
    assert deepspeed_entry(TrainSection(optimizer=row), device="cuda")["params"]["adam_lr"] == 0.1
    whole = deepspeed_config(TrainSection(optimizer=row, zero_stage=3, max_grad_norm=0), device="cpu")
    assert whole["zero_optimization"]["reduce_scatter"] is False


@pytest.mark.parametrize(
    ("passed", "key", "remedy"),
    [
        ({"zero_optimization": {"stage": 1}}, "train.deepspeed.zero_optimization.stage", "train.zero_stage"),
        ({"gradient_clipping": 2.0}, "train.deepspeed.gradient_clipping", "train.max_grad_norm"),
        ({"train_batch_size": 8}, "train.deepspeed.train_batch_size", "train.prompts_per_batch"),
        ({"gradient_accumulation_steps": 4}, "train.deepspeed.gradient_accumulation_steps", "tokens_per_microbatch"),
        ({"fp16": {"enabled": True}}, "train.deepspeed.fp16.enabled", "train.dtype=bfloat16"),
        ({"bf16": {"enabled": True}}, "train.deepspeed.bf16.enabled", "train.dtype"),
        ({"optimizer": {"type": "SGD"}}, "train.deepspeed.optimizer", "train.optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "train.deepspeed.scheduler", "train.schedule"),
        ({"tensor_parallel": {"autotp_size": 2}}, "train.deepspeed.tensor_parallel.autotp_size", "tensor_parallel"),
        ({"managed_gradient_accumulation": False}, "train.deepspeed.managed_gradient_accumulation", "Leave it out"),
        ({"expert_parallel": {"enabled": True}}, "train.deepspeed.expert_parallel.enabled", "train.expert_parallel"),
        ({"sequence_parallel_size": 2}, "train.deepspeed.sequence_parallel_size", "train.sequence_parallel"),
    ],
)
def test_entry_that_contradicts_ours_is_refused_and_names_the_key_to_set_instead(passed, key, remedy):
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(TrainSection(deepspeed=passed), device="cpu")
    assert caught.value.what == key and remedy in caught.value.remedy


def test_experts_are_shared_out_and_pieces_of_rows_reduced_in_one_way_alone():
    config = deepspeed_config(TrainSection(ranks=2, expert_parallel=2), device="cpu")
    assert config["expert_parallel"] == {"enabled": True, "autoep_size": 2}
    assert "expert_parallel" not in deepspeed_config(TrainSection(), device="cpu")
    passed = {"zero_optimization": {"reduce_scatter": False}}
    deepspeed_config(TrainSection(zero_stage=3, deepspeed=passed), device="cpu")
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(TrainSection(zero_stage=3, sequence_parallel=2, deepspeed=passed), device="cpu")
    assert caught.value.what == "train.deepspeed.zero_optimization.reduce_scatter"
