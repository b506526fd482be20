"""Synchronous on-policy GRPO in plain torch and transformers: what the asynchronous system must equal bit for bit at
``max_staleness`` 0. Imports nothing of controller, buffer, batch, train or algo, and uses none of their code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
from transformers import AutoModelForCausalLM

CAP = 2.0  # of the truncated importance weight
EPS = 1e-6  # beside the standard deviation of a group


def sample(model: torch.nn.Module, prompt: Sequence[int], num_tokens: int, seed: int) -> tuple[list[int], list[float]]:
    """Tokens drawn one by one from the model's own forward, with their log-probabilities (temperature 1)."""
    generator = torch.Generator().manual_seed(seed)
    token_ids, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(num_tokens):
            positions = torch.arange(len(token_ids)).unsqueeze(0)
            inputs = torch.tensor([token_ids])
            logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits[0, -1]
            token = int(torch.multinomial(torch.softmax(logits, -1), 1, generator=generator))
            logprobs.append(float(logits[token] - torch.logsumexp(logits, -1)))
            token_ids.append(token)
    return token_ids[len(prompt) :], logprobs


def seed_of(base: int, rollout_id: str) -> int:
    return int.from_bytes(blake2b(f"{base}/{rollout_id}".encode(), digest_size=8).digest()) >> 1


def train(
    folder: str,
    prompts: Sequence[Sequence[int]],
    reward: Callable[[Sequence[int]], float],
    *,
    steps: int,
    prompts_per_batch: int,
    group_size: int,
    num_tokens: int,
    lr: float,
    seed: int,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Returns the loss of each step, and the final weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.0)
    losses = []
    for step in range(steps):
        rows = []
        for index in range(step * prompts_per_batch, (step + 1) * prompts_per_batch):
            answers = [
                sample(model, prompts[index], num_tokens, seed_of(seed, f"law:0:{index}#0/{member}"))
                for member in range(group_size)
            ]
            rewards = torch.tensor([reward(token_ids) for token_ids, _ in answers], dtype=torch.float64)
            centred = rewards - rewards.mean()
            advantages = (centred / (rewards.std() + EPS)).float() if bool(centred.any()) else centred.float()
            rows += [(prompts[index], *answer, advantages[k]) for k, answer in enumerate(answers)]
        optimizer.zero_grad()
        scale = 1 / (len(rows) * num_tokens)
        total = 0.0
        for prompt, answer, behaviour, advantage in rows:
            policy = answer_logprobs(model, prompt, answer)
            weight = (policy.detach() - torch.tensor(behaviour)).exp().clamp(max=CAP)
            loss = weight * (-advantage * (policy - policy.detach()).exp())
            (loss.sum() * scale).backward()
            total += float(loss.detach().double().sum())
        optimizer.step()
        losses.append(total / (len(rows) * num_tokens))
    return losses, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def answer_logprobs(model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of the answer's tokens, with gradient."""
    token_ids = torch.tensor([[*prompt, *answer]])
    positions = torch.arange(token_ids.shape[1]).unsqueeze(0)
    logits = model(input_ids=token_ids, position_ids=positions, use_cache=False).logits[0]
    logprobs = logits[:-1].gather(1, token_ids[0, 1:, None]).squeeze(1) - torch.logsumexp(logits[:-1], -1)
    return logprobs[len(prompt) - 1 :]
