"""What a vLLM engine is started with.

Imports without vllm: the driver checks this and passes it on before an actor starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlsys.errors import ConfigError
from rlsys.weights.probe import NUM_SEQUENCES, NUM_TOKENS

PLUGIN = "rlsys.weights.vllm_plugin.WorkerExtension"

# engine arguments that follow from other keys or carry the engine contract, and where they come from
UpdateMode = Literal["recompute", "keep", "drain"]
_CONTRACT = "part of how rlsys drives an engine; it cannot be changed"
OWNED_ARGUMENTS = {
    "model": "model.path",
    "tokenizer": "model.path",
    "dtype": "model.dtype",
    "seed": "run.seed",
    "max_num_seqs": "rollout.slots",
    "max_model_len": "derived from the longest prompt and rollout.max_tokens",
    "logprobs_mode": _CONTRACT,
    "weight_transfer_config": _CONTRACT,
    "worker_extension_cls": _CONTRACT,
    "scheduling_policy": _CONTRACT,
    "enable_chunked_prefill": _CONTRACT,
    "enable_lora": "train.lora",
    "max_loras": "train.lora",
    "max_cpu_loras": "train.lora",
    "max_lora_rank": "train.lora",
    "lora_dtype": "model.dtype",
    "lora_target_modules": "train.lora",
}
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for; a smaller adapter is padded


def refuse_owned_arguments(vllm: Mapping[str, Any], key: str, owned: Mapping[str, str]) -> None:
    """Raises ConfigError where ``vllm``, given under the config key ``key``, names an argument that rlsys sets itself.

    Args:
        owned: these arguments, and where they come from.
    """
    for name, value in vllm.items():
        if name in owned:
            raise ConfigError(
                f"{key}.{name}",
                got=repr(value),
                wanted="an engine argument that rlsys does not set itself",
                remedy=f"remove it: {owned[name]}",
            )


def num_workers(vllm: Mapping[str, Any]) -> int:
    """Processes that one engine with these arguments computes in: tensor-parallel shares times pipeline stages."""
    return int(vllm.get("tensor_parallel_size") or 1) * int(vllm.get("pipeline_parallel_size") or 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRoom:
    """What an engine that serves an adapter on its base model keeps room for.

    Attributes:
        rank: the largest of its layers' ranks, at most the last of ``LORA_RANKS``.
        modules: names of the layers that have one, each the last part of a module's name.

    Example:
        >>> AdapterRoom(rank=12, modules=("q_proj", "v_proj")).arguments()["max_lora_rank"]
        16
    """

    rank: int
    modules: tuple[str, ...]

    def arguments(self) -> dict[str, Any]:
        """Keywords of vLLM's ``AsyncEngineArgs``."""
        return {
            "enable_lora": True,
            "max_loras": 1,
            "max_cpu_loras": 1,
            "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= self.rank),
            "lora_dtype": "auto",  # that of the base model
            # no room at other layers: at the head alone it would be as large as the vocabulary
            "lora_target_modules": list(self.modules),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmSettings:
    """How one engine is brought up.

    Attributes:
        model: Hugging Face folder.
        dtype: precision, a key of ``rlsys.weights.probe.TOLERANCE``.
        max_model_len: longest context, prompt and answer together, tokens.
        slots: most rollouts at once.
        seed: of the engine; each request brings its own.
        start_timeout_s: deadline for the engine to come up, seconds.
        timeout_s: deadline of one request and of one weight swap, seconds.
        vllm: further engine arguments, passed through (config key ``rollout.vllm``).
        update_mode: how requests in flight go on under new weights (config key ``rollout.update_mode``).
        adapter: room for what versions consist of, an adapter on the base in ``model``; None: they are all weights.
        weight_backend: of vLLM's own, by which a sender brings versions; None: the workers load the segment.
        worker_extension: class whose import registers the transfer engine in the worker process.

    Raises:
        ConfigError: ``vllm`` names an argument that rlsys sets itself.

    Example:
        >>> VllmSettings(model="m", dtype="float32", max_model_len=512, slots=8, seed=0,
        ...              start_timeout_s=600, timeout_s=300).arguments(on_cpu=True)["max_num_seqs"]
        8
    """

    model: str
    dtype: str
    max_model_len: int
    slots: int
    seed: int
    start_timeout_s: float
    timeout_s: float
    vllm: Mapping[str, Any] = field(default_factory=dict)
    update_mode: UpdateMode = "recompute"
    adapter: AdapterRoom | None = None
    weight_backend: str | None = None
    worker_extension: str = PLUGIN

    def __post_init__(self) -> None:
        refuse_owned_arguments(self.vllm, "rollout.vllm", OWNED_ARGUMENTS)

    @property
    def _most_sequences(self) -> int:
        """So many that the proof of a version never waits for a rollout. In ``keep`` full slots go on at once after a
        swap, and the probe needs room beside them; elsewhere no slot is taken when it is asked, and it goes first."""
        return self.slots + NUM_SEQUENCES if self.update_mode == "keep" else max(self.slots, NUM_SEQUENCES)

    def arguments(self, *, on_cpu: bool) -> dict[str, Any]:
        """Keywords of vLLM's ``AsyncEngineArgs``, but for the weight transfer config, which is a vLLM object."""
        defaults: dict[str, Any] = {
            "enforce_eager": on_cpu,  # on CPU compiling takes over a minute and gains nothing
            "disable_log_stats": False,  # the router goes by them
        }
        if num_workers(self.vllm) > 1:
            # left to itself, vLLM would ask Ray for actors of its own beside the one that holds the resources
            defaults["distributed_executor_backend"] = "mp"
        owned: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "seed": self.seed,
            "max_num_seqs": self._most_sequences,
            "max_model_len": max(self.max_model_len, NUM_TOKENS + 1),
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": self.worker_extension,
            "scheduling_policy": "priority",  # the probe goes before every rollout
            # On CPU a prefill cut into chunks kills vLLM where the request has a seed: it takes the cut request's
            # sample back by the generator's offset, and a CPU generator has none. After a swap every context in flight
            # is prefilled again, more than fits into one batch.
            "enable_chunked_prefill": not on_cpu,
        }
        if self.update_mode == "keep":
            owned["enable_prefix_caching"] = False  # what stays in it is of the old weights, and new requests would hit
        if self.adapter is not None:
            owned |= self.adapter.arguments()
        return {**defaults, **self.vllm, **owned}


def engine_environment(
    *, cpus: float, gpus: float, workers: int = 1, kv_cache_gib: int = 1, takes_handles: bool = False
) -> dict[str, str]:
    """Environment variables that an engine's process needs before it imports vllm.

    Args:
        cpus: cores of the engine; fractions count as one.
        gpus: above 0, the settings of the CPU backend are left out.
        workers: processes that share the cores (``num_workers``).
        kv_cache_gib: key-value cache of the CPU backend, GiB in each of them.
        takes_handles: whether weights come as handles to memory of a GPU.
    """
    everywhere = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would copy the threads' locks of the process that drives it
        "TOKENIZERS_PARALLELISM": "false",
    }
    if takes_handles:  # which vLLM sends on to its own processes as pickles only
        everywhere["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if gpus > 0:
        return everywhere
    threads = str(max(1, int(cpus / workers)))
    return everywhere | {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a single worker lives in the engine's process: one process less
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # Ray decides where processes run
        # without it the first request with log-probabilities compiles for ten seconds, eager or not
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
    }
