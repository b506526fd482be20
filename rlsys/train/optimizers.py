"""OPTIMIZERS: what DeepSpeed builds the optimizer from. A row gives its name there and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlsys.algo.rows import RowFacts, row, table
from rlsys.config.schema import TrainSection


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """Attributes:
    kind: its name in DeepSpeed, or that of a class of torch.optim.
    params: its settings beside the learning rate, the weight decay and the betas.
    has_betas: whether it has two moments, and ``train.betas`` are their decay rates.
    is_adam: whether a part of it, or all, is an Adam that torch has too.
    op: builder of the compiled op in DeepSpeed by which it runs where its state is offloaded; None: it has none.
    on_cpu: whether it runs on CPU ranks without being offloaded.
    """

    kind: str
    params: Mapping[str, Any]
    has_betas: bool = False
    is_adam: bool = False
    op: str | None = None
    on_cpu: bool = True


@row(RowFacts(source="Loshchilov and Hutter 2019, arXiv:1711.05101"))
def adamw(*, eps: float = 1e-8) -> Optimizer:
    """Adam with decoupled weight decay."""
    return Optimizer(kind="AdamW", params={"eps": eps}, has_betas=True, is_adam=True, op="CPUAdamBuilder")


@row(RowFacts(source="Kingma and Ba 2015, arXiv:1412.6980"))
def adam(*, eps: float = 1e-8) -> Optimizer:
    """Adam; weight decay is added to the gradient."""
    params = {"eps": eps, "adam_w_mode": False}
    return Optimizer(kind="Adam", params=params, has_betas=True, is_adam=True, op="CPUAdamBuilder")


@row(RowFacts(source="stochastic gradient descent"))
def sgd(*, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False) -> Optimizer:
    """Weight decay is added to the gradient."""
    assert not nesterov or (momentum > 0.0 and dampening == 0.0), "nesterov needs a momentum and no dampening"
    return Optimizer(kind="SGD", params={"momentum": momentum, "dampening": dampening, "nesterov": nesterov})


@row(RowFacts(source="Duchi et al. 2011, jmlr.org/papers/v12/duchi11a"))
def adagrad(*, eps: float = 1e-10) -> Optimizer:
    """Weight decay is added to the gradient."""
    return Optimizer(kind="Adagrad", params={"eps": eps}, op="CPUAdagradBuilder")


@row(RowFacts(source="Chen et al. 2023, arXiv:2302.06675"))
def lion() -> Optimizer:
    """The sign of a momentum, and decoupled weight decay; wants a third to a tenth of the learning rate of AdamW."""
    return Optimizer(kind="Lion", params={}, has_betas=True, op="CPULionBuilder", on_cpu=False)


@row(RowFacts(source="Jordan et al. 2024, kellerjordan.github.io/posts/muon"))
def muon(*, momentum: float = 0.95, adam_lr: float | None = None, eps: float = 1e-8) -> Optimizer:
    """A momentum made orthogonal, on the matrices between embedding and head; AdamW on everything else.

    Args:
        adam_lr: learning rate of what AdamW trains; None: train.lr, as the matrices.
    """
    params: dict[str, Any] = {"momentum": momentum, "eps": eps}
    if adam_lr is not None:
        params["adam_lr"] = adam_lr
    return Optimizer(kind="Muon", params=params, has_betas=True, is_adam=True, op="CPUAdamBuilder")


OPTIMIZERS = table(adamw, adam, sgd, adagrad, lion, muon)

# What DeepSpeed had once, and why it is not a row
GONE: Mapping[str, str] = {
    **dict.fromkeys(
        ("onebit_adam", "onebitadam", "onebit_lamb", "onebitlamb", "zero_one_adam", "zerooneadam"),
        "DeepSpeed no longer has optimizers that compress to one bit, and they never ran on CPU",
    ),
}


def chosen(train: TrainSection) -> Optimizer:
    """The optimizer of a section whose row is known to exist."""
    result: Optimizer = OPTIMIZERS[train.optimizer.name](**train.optimizer.params)
    return result


def is_offloaded(train: TrainSection) -> bool:
    """Whether the optimizer's state is: by ``train.offload``, or onto a disk, which ``train.deepspeed`` names."""
    zero = train.deepspeed.get("zero_optimization", {})
    passed = zero.get("offload_optimizer", {}) if isinstance(zero, Mapping) else {}
    return train.offload != "none" or passed.get("device", "none") != "none"


def deepspeed_entry(train: TrainSection, *, device: str) -> dict[str, Any]:
    """The ``optimizer`` of DeepSpeed's configuration.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    optimizer = chosen(train)
    params = {"lr": train.lr, "weight_decay": train.weight_decay, **optimizer.params}
    if optimizer.has_betas:
        params["betas"] = list(train.betas)
    if optimizer.is_adam and device == "cpu" and not is_offloaded(train):
        params["torch_adam"] = True  # else a C++ op is compiled at start, to do the same
    return {"type": optimizer.kind, "params": params}
