"""What vLLM says of itself, read from the metrics that its front end keeps in this process."""

from __future__ import annotations

from vllm.platforms import current_platform
from vllm.v1.metrics.reader import Counter, Gauge, get_metrics_snapshot

from rlsys.rollout.router import EngineReport
from rlsys.rollout.vllm_settings import VllmSettings

CPU_BLOCK_TOKENS, GPU_BLOCK_TOKENS = 128, 16  # vLLM's own, where ``block_size`` is not given
WAITING, KV_SHARE, PREEMPTED = "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:num_preemptions"


def engine_report(settings: VllmSettings) -> EngineReport:
    """Of the one engine that is driven from this process. With ``disable_log_stats`` vLLM keeps no statistics.

    vLLM counts as preempted also what a weight swap throws out of the cache.
    """
    values: dict[str, float] = {}
    for metric in get_metrics_snapshot():
        if isinstance(metric, Counter | Gauge):  # of several data-parallel ranks the sum, of their caches the fullest
            before = values.get(metric.name, 0.0)
            values[metric.name] = max(before, metric.value) if metric.name == KV_SHARE else before + metric.value
    block = settings.vllm.get("block_size") or (CPU_BLOCK_TOKENS if current_platform.is_cpu() else GPU_BLOCK_TOKENS)
    if not {WAITING, KV_SHARE, PREEMPTED} <= values.keys():
        return EngineReport(cache_block_tokens=int(block))
    return EngineReport(
        cache_block_tokens=int(block),
        num_waiting=int(values[WAITING]),
        kv_share=values[KV_SHARE],
        num_preempted=int(values[PREEMPTED]),
    )
