"""A worker extension for tests: while a marker file lies beside the segments, tied embeddings are not packed again.

This is what vLLM's own reload does on CPU; the probe must catch it.
"""

from __future__ import annotations

import os

import torch

from rlsys.weights import vllm_plugin

MARKER_VARIABLE = "RLSYS_TEST_SKIP_REPACK"

_repack = vllm_plugin.repack_tied_embeddings


def _repack_unless_marked(model: torch.nn.Module) -> int:
    return 0 if os.path.exists(os.environ[MARKER_VARIABLE]) else _repack(model)


vllm_plugin.repack_tied_embeddings = _repack_unless_marked


class WorkerExtension:
    """Names this module to vLLM."""
