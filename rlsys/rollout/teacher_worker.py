"""What a teacher's worker process imports, since vLLM's ``worker_extension_cls`` names a class in it: it ends with the
process that drives the engine."""

from __future__ import annotations

from rlsys.weights.owner import end_with_named_owner


class WorkerExtension:
    """Names this module to vLLM."""


end_with_named_owner()
