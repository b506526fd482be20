"""The next version beside the running model: loaded and packed while generation goes on.

On CPU vLLM packs every linear layer's matrix for its kernels. That takes a second and more where the model has a
hundred million weights, and must not lie in the pause. So a twin of the model is made, which shares everything but the
tensors, and the version is loaded into the twin by vLLM's own code, in a thread. In the pause the running modules take
over what the twin's hold. Until then two copies of the weights are in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention, is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImplBase

# What they make of a loaded weight lies in attributes of its own module.
_KNOWN_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
_RELOADING = "online_process_loader"  # the name of what a reload wraps loaders in
Named = tuple[str, torch.Tensor]


def can_prepare(model: torch.nn.Module, config: VllmConfig) -> bool:
    """Whether the twin's modules hold everything that loading a version changes.

    Not so where kernels keep packed weights in objects of their own (experts, quantised layers, latent attention),
    where a compiled graph holds on to them, and where adapters wrap the layers. On a GPU nothing is packed.
    """
    return (
        current_platform.is_cpu()
        and config.compilation_config.mode == CompilationMode.NONE
        and config.lora_config is None
        and all(_is_known(module) for module in model.modules())
    )


class PreparedWeights:
    """One version on its way into the twin of a running model. Begins at once, in a thread.

    Args:
        model: the running one.
        tensors: the version, by the names of the model's files.
        load: loads tensors into a model as vLLM reloads weights.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: VllmConfig,
        tensors: Iterator[Named],
        load: Callable[[torch.nn.Module, Iterator[Named]], None],
    ) -> None:
        self._model, self._config, self._tensors, self._load = model, config, tensors, load
        self._twins: dict[torch.nn.Module, torch.nn.Module] = {}
        self._is_abandoned = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="prepare weights", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    @property
    def failure(self) -> str | None:
        """Why it ended without weights; None where it did not."""
        return self._failure

    def abandon(self) -> None:
        """End it, within the time of one tensor: its source may be overwritten afterwards."""
        self._is_abandoned = True
        self._thread.join()
        self._forget()

    def exchange(self) -> None:
        """The running modules take over what the twin's hold. Nothing may run on the model meanwhile."""
        retired = []
        for module, twin in self._twins.items():
            if not twin._parameters or is_deferred_attention_layer(module):
                continue
            before = module.__dict__
            changed = {
                name: value
                for name, value in twin.__dict__.items()
                if name not in ("_modules", "_non_persistent_buffers_set") and value is not before.get(name)
            }
            retired.append({name: before[name] for name in changed if name in before})
            before.update(changed)
        self._forget()
        # giving memory back takes tens of milliseconds, which the pause need not wait for
        threading.Thread(target=retired.clear, name="give old weights back", daemon=True).start()

    def _run(self) -> None:
        try:
            with torch.no_grad(), set_current_vllm_config(self._config):
                self._twins = _twins_of(self._model)
                self._load(self._twins[self._model], self._unless_abandoned())
        except Exception as error:  # whatever vLLM's loaders raise: the running model is as it was
            self._failure = f"{type(error).__name__}: {error}"
        finally:
            for twin in self._twins.values():
                LAYERWISE_INFO.pop(twin, None)  # its tensors refer to the twin, which would never go

    def _forget(self) -> None:
        for twin in self._twins.values():
            twin.__dict__.clear()  # whatever still refers to it holds no weights
        self._twins.clear()

    def _unless_abandoned(self) -> Iterator[Named]:
        for name, tensor in self._tensors:
            if self._is_abandoned:
                raise InterruptedError("abandoned")
            yield name, tensor


def _is_known(module: torch.nn.Module) -> bool:
    if is_deferred_attention_layer(module):
        impl: Any = getattr(module, "impl", None)
        return (
            isinstance(module, Attention)
            and type(impl).process_weights_after_loading is AttentionImplBase.process_weights_after_loading
        )
    method = getattr(module, "quant_method", None)
    return not isinstance(method, QuantizeMethodBase) or type(method) in _KNOWN_METHODS


def _twins_of(model: torch.nn.Module) -> dict[torch.nn.Module, torch.nn.Module]:
    """A second module for every module, with tensors of its own that hold the same; what is tied stays tied."""
    twins: dict[torch.nn.Module, torch.nn.Module] = {}
    tensors: dict[int, torch.Tensor] = {}
    for module in model.modules():
        twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        twins[module] = twin

    def own(named: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        for tensor in named.values():
            if tensor is not None and id(tensor) not in tensors:
                tensors[id(tensor)] = _copy_of(tensor)
        return {name: None if tensor is None else tensors[id(tensor)] for name, tensor in named.items()}

    for module, twin in twins.items():
        twin.__dict__["_parameters"] = own(module._parameters)  # type: ignore[arg-type]
        twin.__dict__["_buffers"] = own(module._buffers)
        twin.__dict__["_modules"] = {name: child and twins[child] for name, child in module._modules.items()}
        twin.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
        LAYERWISE_INFO[twin] = _metadata_of(module, twin)
    return twins


def _metadata_of(module: torch.nn.Module, twin: torch.nn.Module) -> LayerReloadingInfo:
    """What vLLM restores a layer from before it loads it. A reload binds the loaders in it to the layer, and wraps
    them: the twin needs its own."""
    info = get_layerwise_info(module)
    parameters, buffers = (
        {name: _bound_to_twin(tensor, module, twin) for name, tensor in tensors.items()}
        for tensors in info.restore_metadata
    )
    return LayerReloadingInfo(restore_metadata=(parameters, buffers), restore_device=info.restore_device)


def _bound_to_twin(tensor: torch.Tensor, module: torch.nn.Module, twin: torch.nn.Module) -> torch.Tensor:
    copy = to_meta_tensor(tensor)
    for name, value in copy.__dict__.items():
        while getattr(value, "__name__", None) == _RELOADING:
            value = value.__wrapped__
        is_own = isinstance(value, MethodType) and value.__self__ is module
        copy.__dict__[name] = MethodType(value.__func__, twin) if is_own else value
    return copy


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """With the class and the attributes that vLLM's loaders go by."""
    copy = tensor.data.clone()
    copy.__class__ = tensor.__class__
    copy.__dict__.update(tensor.__dict__)
    return copy
