"""A worker extension for tests.

While a marker file lies beside the segments, tied embeddings are not packed again (this is what vLLM's own reload does
on CPU; the probe must catch it); while another one does, nothing is prepared beside the running model. And it counts
what can only be seen in the worker.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from vllm import _custom_ops

from rlsys.weights import vllm_plugin
from rlsys.weights.vllm_prepared import PreparedWeights
from tests.integration.serving import MARKER_VARIABLE, NEVER_PREPARE

_repack = vllm_plugin.repack_tied_embeddings
_can_prepare = vllm_plugin.can_prepare
_exchange = PreparedWeights.exchange
_pack = _custom_ops.create_onednn_mm
_packed: WeakSet[Any] = WeakSet()
_num_exchanges = 0


def _repack_unless_marked(model: torch.nn.Module) -> int:
    return 0 if os.path.exists(os.environ[MARKER_VARIABLE]) else _repack(model)


def _can_prepare_unless_marked(*arguments: Any) -> bool:
    return not Path(os.environ[MARKER_VARIABLE]).with_name(NEVER_PREPARE).exists() and _can_prepare(*arguments)


def _exchange_counted(self: PreparedWeights) -> None:
    global _num_exchanges
    _num_exchanges += 1
    _exchange(self)


def _pack_counted(*arguments: Any) -> Any:
    handler = _pack(*arguments)
    _packed.add(handler)
    return handler


vllm_plugin.repack_tied_embeddings = _repack_unless_marked
vllm_plugin.can_prepare = _can_prepare_unless_marked  # type: ignore[assignment]
PreparedWeights.exchange = _exchange_counted  # type: ignore[method-assign]
_custom_ops.create_onednn_mm = _pack_counted


class WorkerExtension(vllm_plugin.WorkerExtension):
    """Names this module to vLLM."""

    def num_exchanges(self) -> int:
        """Versions that were prepared beside the running model, and taken over."""
        return _num_exchanges

    def num_packed(self) -> int:
        """Packed matrices that are in memory."""
        return len(_packed)
