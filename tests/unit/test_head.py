"""Log-probabilities straight from hidden states and the head's weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from rlsys.config.schema import TrainSection
from rlsys.errors import ConfigError
from rlsys.train import head as head_module
from rlsys.train.head import LeanHead, give_logits_in_float32
from rlsys.train.logprobs import logprobs_by
from rlsys.train.sameness import check_is_same_model, has_plain_head, tried

VOCABULARY, WIDTH = 37, 8
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def head_answers(hidden_RLD, head, targets_RLM, temperature, entropy_gradient=True) -> torch.Tensor:
    with LeanHead(head).looking_up(targets_RLM, temperature, entropy_gradient):
        return head(hidden_RLD)


def plain_answers(hidden_RLD, head, targets_RLM, temperature) -> torch.Tensor:
    table = torch.log_softmax(torch.nn.functional.linear(hidden_RLD, head.weight, head.bias) / temperature, dim=-1)
    entropy = -(table.exp() * table).sum(-1, keepdim=True)
    return torch.cat([table.gather(2, targets_RLM), entropy], dim=2)


@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 4)),
    columns=st.sampled_from([1, 5, 36, 37, 1000]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    has_bias=st.booleans(),
    is_frozen=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_answers_and_gradients_are_those_of_log_softmax(seed, shape, columns, temperature, has_bias, is_frozen):
    rows, length, looked_up = shape
    torch.manual_seed(seed)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=has_bias)
    head.weight.requires_grad_(not is_frozen)
    plain = torch.nn.Linear(WIDTH, VOCABULARY, bias=has_bias).double()
    plain.load_state_dict(head.state_dict())
    hidden = 4 * torch.randn(rows, length, WIDTH)
    mine, theirs = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    targets = torch.randint(0, VOCABULARY, (rows, length, looked_up))
    upstream = torch.randn(rows, length, looked_up + 1)
    upstream[torch.rand(rows, length) < 0.4] = 0.0  # tokens of a prompt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "_BLOCK_ELEMENTS", 1)
        patch.setattr(head_module, "_MIN_COLUMNS", columns)
        got = head_answers(mine, head, targets, temperature)
        (got * upstream).sum().backward()
    wanted = plain_answers(theirs, plain, targets, temperature)
    (wanted * upstream).sum().backward()
    close = {"atol": 2e-4, "rtol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(got, wanted, **close)
    torch.testing.assert_close(mine.grad, theirs.grad, **close)
    assert torch.equal(mine.grad[(upstream == 0).all(dim=2)], torch.zeros_like(mine.grad[(upstream == 0).all(dim=2)]))
    if is_frozen:
        assert head.weight.grad is None
    else:
        torch.testing.assert_close(head.weight.grad, plain.weight.grad, **close)
    if has_bias:
        torch.testing.assert_close(head.bias.grad, plain.bias.grad, **close)


def test_without_its_gradient_the_entropy_is_only_measured():
    head, hidden = torch.nn.Linear(WIDTH, VOCABULARY), torch.randn(1, 3, WIDTH, requires_grad=True)
    targets = torch.zeros(1, 3, 1, dtype=torch.int64)
    answers = head_answers(hidden, head, targets, 1.0, entropy_gradient=False)
    torch.testing.assert_close(answers, plain_answers(hidden, head, targets, 1.0), atol=1e-5, rtol=1e-5)
    answers[..., 1].sum().backward()
    assert not hidden.grad.any()


def test_large_logits_keep_their_small_differences():
    head = torch.nn.Linear(1, 3, bias=False)
    head.weight.data = torch.tensor([[1000.0], [1000.5], [-1000.0]])
    answers = head_answers(torch.ones(1, 1, 1), head, torch.tensor([[[0, 1]]]), 0.5)
    # two likely tokens a nat apart: log 1 / (1 + e), log e / (1 + e)
    torch.testing.assert_close(answers[0, 0, :2], torch.tensor([-1.3132617, -0.3132617]), atol=2e-4, rtol=0)


def test_outside_a_look_up_the_head_gives_logits_again():
    head, hidden = torch.nn.Linear(WIDTH, VOCABULARY), torch.randn(1, 2, WIDTH)
    wanted = head(hidden)
    head_answers(hidden, head, torch.zeros(1, 2, 1, dtype=torch.int64), 1.0)
    assert torch.equal(head(hidden), wanted)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that is made within."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_logits_are_never_whole_in_memory(monkeypatch):
    monkeypatch.setattr(head_module, "_BLOCK_ELEMENTS", 64 * 128)
    monkeypatch.setattr(head_module, "_MIN_COLUMNS", 16)
    head, hidden = torch.nn.Linear(WIDTH, 1024, bias=False), torch.randn(1, 64, WIDTH, requires_grad=True)
    with LargestTensor() as largest:
        answers = head_answers(hidden, head, torch.zeros(1, 64, 1, dtype=torch.int64), 1.0)
        answers.sum().backward()
    assert largest.elements <= 64 * 128  # a block, and the weight is no larger; the logits have 64 x 1024


@pytest.mark.parametrize(
    ("kind", "keys", "is_plain"),
    [
        ("llama", {}, True),
        ("qwen2", {"tie_word_embeddings": True}, True),
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 30.0}, False),
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": None}, True),
        ("granite", {"logits_scaling": 8.0}, False),
        ("granite", {"logits_scaling": 1.0}, True),
        ("cohere", {"logit_scale": 0.0625}, False),
    ],
)
def test_a_head_is_plain_where_nothing_is_done_to_its_logits(kind, keys, is_plain):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**COMMON, **keys}), attn_implementation="eager"
    )
    whole = tried(model, None, vocab_size=VOCABULARY, device="cpu")
    assert has_plain_head(model, whole) == is_plain


def test_a_model_says_the_same_by_its_lean_head_and_by_whole_logits():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON))
    token_ids, positions = torch.randint(0, VOCABULARY, (2, 6)), torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    candidates = torch.randint(0, VOCABULARY, (2, 6, 3))
    lean, full = (
        logprobs_by(model, head, token_ids, positions, temperature=0.7, candidate_ids=candidates)
        for head in (LeanHead(model.lm_head), None)
    )
    for name in ("logprobs", "entropy", "candidate_logprobs"):
        torch.testing.assert_close(getattr(lean, name), getattr(full, name), atol=1e-5, rtol=1e-5)
    assert not lean.logprobs[0, 3] and lean.candidate_logprobs.shape == (2, 6, 3)


def test_a_head_in_float32_has_the_logprobs_and_gradients_of_one_that_rounds_nothing():
    torch.manual_seed(0)
    hidden = (4 * torch.randn(1, 50, WIDTH)).bfloat16()
    head = torch.nn.Linear(WIDTH, VOCABULARY).bfloat16()
    plain = torch.nn.Linear(WIDTH, VOCABULARY).double()
    plain.load_state_dict(head.state_dict())
    targets = torch.randint(0, VOCABULARY, (1, 50, 1))
    wanted = plain_answers(hidden.double(), plain, targets, 0.7)
    gaps = []
    for in_float32 in (True, False):
        mine = hidden.clone().requires_grad_()
        with LeanHead(head, in_float32=in_float32).looking_up(targets, 0.7, True):
            got = head(mine)
        got.sum().backward()
        assert mine.grad is not None and mine.grad.dtype == head.weight.grad.dtype == torch.bfloat16
        gaps.append(float((got - wanted).detach().abs().max()))
    assert gaps[0] < 1e-4 < 1e-3 < gaps[1]


def test_logits_in_float32_are_those_of_the_weights_as_they_are():
    torch.manual_seed(0)
    hidden, head = torch.randn(1, 5, WIDTH).bfloat16(), torch.nn.Linear(WIDTH, VOCABULARY).bfloat16()
    wanted = torch.nn.functional.linear(hidden.double(), head.weight.double(), head.bias.double())
    assert float((head(hidden) - wanted).abs().max()) > 1e-3
    give_logits_in_float32(head)
    torch.testing.assert_close(head(hidden).double(), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="float32_head"):
        give_logits_in_float32(torch.nn.Identity())


def test_a_model_that_became_another_one_when_it_was_cut_is_refused():
    train = TrainSection(tensor_parallel=2)
    check_is_same_model(torch.zeros(2, 8), torch.full((2, 8), 1e-5), train)
    for got in (torch.full((2, 8), 0.01), torch.full((2, 8), float("nan"))):
        with pytest.raises(ConfigError) as caught:
            check_is_same_model(got, torch.zeros(2, 8), train)
        assert caught.value.what == "train.tensor_parallel=2"
    check_is_same_model(torch.full((2, 8), 0.01), torch.zeros(2, 8), TrainSection(dtype="bfloat16"))
