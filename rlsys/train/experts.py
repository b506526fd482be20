"""The routers of a mixture of experts: how they load their experts, and the loss that balances the load.

A router gives each token to K of E experts. Where few experts get most tokens, the others learn nothing, and under
expert parallel their processes wait. The balance loss of a layer is that of the Switch Transformer (Fedus et al. 2022,
equations 4 to 6), as transformers counts it, for K experts a token::

    E x sum_e share_e x probability_e        K where all experts are loaded alike

``share_e``: choices of expert e, over tokens; it has no gradient. ``probability_e``: mean over tokens of the softmax of
the router's logits. Both are means over all tokens of an optimizer step, whichever microbatch and rank they are in
(law 4): taken by microbatch the loss would ask every few sequences for balance, and change with the packing. So the
shares are counted first, in a forward pass of their own, and the loss is then linear in the probabilities. The loss of
the model is the mean over its layers: transformers pools them, so that one layer's idle experts make up for another's.

Legend: R rows, L tokens of a row, N = R x L, E experts, K experts of a token, M layers with experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from rlsys.batch.tensors import Microbatch
from rlsys.errors import ConfigError
from rlsys.train import parallel

_CLASS_ENDS = "TopKRouter"  # so transformers names its routers, and DeepSpeed the one that it puts in their place


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What routers did with some tokens.

    Attributes:
        choices: [M, E], tokens that chose each expert.
        probabilities: [M, E], sum over the tokens; with gradient where the pass had one.
        entropy: sum over tokens and layers of the entropy of the router's distribution, nats.
        num_tokens: padding excluded.
    """

    choices: Tensor
    probabilities: Tensor
    entropy: Tensor
    num_tokens: int

    def flat(self) -> Tensor:
        """float64 [2 M E + 2], without gradient: adds up."""
        parts = (self.choices.reshape(-1), self.probabilities.detach().reshape(-1), self.entropy.reshape(1))
        return torch.cat([*(part.double() for part in parts), self.choices.new_tensor([self.num_tokens]).double()])


class Routers:
    """Watches the routers of a model. Dense models have none; every method then does nothing.

    Args:
        module: as it is trained, with DeepSpeed's hooks already on it.
        coef: weight of the balance loss; 0 switches it off.
        cut: of rows, where the model has only a piece of each (``Trained.cut``).

    Raises:
        ConfigError: ``coef`` is not 0, and the model has no router that could be balanced.
    """

    def __init__(
        self, module: Module, *, coef: float, device: str, cut: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._coef, self._device, self._cut = coef, device, cut
        self._routers = [part for part in module.modules() if _is_router(part)]
        if coef and not self._routers:
            raise ConfigError(
                "train.router_aux_coef",
                got=f"{coef:g} for {type(module).__name__}, which has no router (a class named ...{_CLASS_ENDS})",
                wanted="a mixture of experts whose routers give logits, weights and choices, as Mixtral and Qwen3-MoE",
                remedy="leave it out",
            )
        for index, router in enumerate(self._routers):
            gate = getattr(router, "gate", None)
            if gate is not None:  # DeepSpeed's router keeps its logits to itself
                gate.register_forward_hook(partial(self._saw_logits, index))
            router.register_forward_hook(partial(self._saw, index))
        self._is_watched = False
        self._logits: dict[int, Tensor] = {}  # [N, E], by the router's index
        self._choices: dict[int, Tensor] = {}  # [N, K]
        self._last: Load | None = None
        self._total: Tensor | None = None
        self._shares_ME: Tensor | None = None
        self._num_tokens = 0.0

    @contextmanager
    def at(self, microbatch: Microbatch) -> Iterator[None]:
        """Within, one forward pass over ``microbatch`` runs. What is recomputed in the backward pass does not count."""
        if not self._routers:
            yield
            return
        self._is_watched = True
        try:
            yield
        finally:
            self._is_watched = False
        logits = [self._logits[index] for index in range(len(self._routers))]
        if not self._coef:  # no gradient is asked for
            logits = [of_layer.detach() for of_layer in logits]
        layers = list(zip(logits, (self._choices[index] for index in range(len(logits))), strict=True))
        self._logits, self._choices = {}, {}
        mask_RL = _token_mask(microbatch).to(self._device)
        self._last = load_of(layers, (mask_RL if self._cut is None else self._cut(mask_RL)).reshape(-1))
        if torch.is_grad_enabled():
            own = self._last.flat()
            self._total = own if self._total is None else self._total + own

    def settle(self, microbatches: Sequence[Microbatch], forward: Callable[[Microbatch], Any]) -> None:
        """Count the shares of an optimizer step, before its first backward pass. A collective.

        Args:
            microbatches: all of this rank's.
            forward: a pass without gradient that is watched.
        """
        if not self._coef:
            return
        own = []
        for microbatch in microbatches:
            forward(microbatch)
            assert self._last is not None
            own.append(self._last)
        choices_ME = torch.stack([load.choices for load in own]).sum(0).double()
        num_tokens = choices_ME.new_tensor([sum(load.num_tokens for load in own)])
        everywhere = parallel.total_of_processes(torch.cat([choices_ME.reshape(-1), num_tokens]), self._device)
        self._num_tokens = float(everywhere[-1])
        self._shares_ME = (everywhere[:-1].view_as(choices_ME) / self._num_tokens).float()

    def balance_loss(self) -> Tensor | float:
        """The share of the microbatch seen last in ``coef`` x the balance loss; those of all of them add up to it."""
        if not self._coef:
            return 0.0
        assert self._last is not None and self._shares_ME is not None
        num_layers, num_experts = self._shares_ME.shape
        product = (self._shares_ME * self._last.probabilities).sum()
        return product * (self._coef * num_experts / num_layers / self._num_tokens)

    def metrics(self) -> dict[str, float]:
        """``load_metrics`` of all that was trained since the last call, over all ranks. A collective."""
        if self._total is None or self._last is None:
            return {}
        numbers, self._total = parallel.total_of_processes(self._total, self._device), None
        num_layers, num_experts = self._last.choices.shape
        choices_ME, probabilities_ME = numbers[:-2].view(2, num_layers, num_experts)
        everywhere = Load(
            choices=choices_ME, probabilities=probabilities_ME, entropy=numbers[-2], num_tokens=int(numbers[-1])
        )
        return load_metrics(everywhere)

    # Hooks keep what they see, and compute nothing: torch counts what a layer whose activations are checkpointed saves,
    # and would miss it when the layer is computed again, unwatched.

    def _saw_logits(self, index: int, gate: Module, inputs: Any, logits_NE: Tensor) -> None:
        if self._is_watched:
            self._logits[index] = logits_NE

    def _saw(self, index: int, router: Module, inputs: Any, output: Any) -> None:
        if self._is_watched and index in self._logits:
            self._choices[index] = output[1]
        elif self._is_watched:
            first, _, last = output  # logits, weights, choices; a few classes have it the other way round
            self._logits[index], self._choices[index] = (first, last) if first.is_floating_point() else (last, first)


def _is_router(module: Module) -> bool:
    return type(module).__name__.endswith(_CLASS_ENDS)


def load_of(layers: Sequence[tuple[Tensor, Tensor]], mask_N: Tensor) -> Load:
    """Of the logits and choices of every layer; ``mask_N``: tokens that count."""
    weights_N = mask_N.float()
    choices, probabilities, entropy = [], [], weights_N.new_zeros(())
    for logits_NE, ids_NK in layers:
        logprobs_NE = torch.log_softmax(logits_NE.float(), dim=-1)
        probs_NE = logprobs_NE.exp()
        choices_E = weights_N.new_zeros(logits_NE.shape[1])
        choices.append(choices_E.index_add_(0, ids_NK.flatten().long(), weights_N.repeat_interleave(ids_NK.shape[1])))
        probabilities.append(weights_N @ probs_NE)
        entropy = entropy - weights_N @ (probs_NE * logprobs_NE).sum(-1).detach()
    return Load(
        choices=torch.stack(choices),
        probabilities=torch.stack(probabilities),
        entropy=entropy,
        num_tokens=int(mask_N.sum()),
    )


def load_metrics(load: Load) -> dict[str, float]:
    """``max_load``: the busiest expert's share of its layer's choices, times E: 1 where all are loaded alike.
    ``dead_experts``: chosen by no token, over all layers. ``balance_loss``: see above; without its weight.
    """
    num_layers, num_experts = load.choices.shape
    product = (load.choices * load.probabilities).sum() / load.num_tokens**2
    return {
        "router/max_load": float(load.choices.max() / load.choices[0].sum()) * num_experts,
        "router/entropy": float(load.entropy) / load.num_tokens / num_layers,
        "router/dead_experts": float((load.choices == 0).sum()),
        "router/balance_loss": float(product) * num_experts / num_layers,
    }


def _token_mask(microbatch: Microbatch) -> Tensor:
    """bool [R, L], the tokens of samples: what fills a row up is given to experts too, but nobody asked for it."""
    mask = torch.zeros(microbatch.token_ids.shape, dtype=torch.bool)
    for segment in microbatch.segments:
        mask[segment.row, segment.offset : segment.offset + segment.length] = True
    return mask
