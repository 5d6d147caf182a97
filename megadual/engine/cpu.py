"""megatron-core on a machine without CUDA.

megatron-core has no CPU mode: it asks torch.cuda for the current device, allocates scalars with
device="cuda", keeps RNG states in the CUDA generator and compares tensor type strings. Where there is no GPU
each of these can be answered with "the CPU"; `install()` does that, for the whole process. With CUDA present
it does nothing. Call it before the first `import megatron.core`.
"""

import functools
import importlib.util
import logging
import os
import sys
import types

import torch
import torch.utils._device

PATCHES: list[str] = []  # the names of everything replaced


def _replace(owner, name: str, value) -> None:
    PATCHES.append(f"{owner.__name__}.{name}")
    setattr(owner, name, value)


class _Stream:
    """CPU work is ordered already, so waiting on a stream is nothing."""

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass


def _on_host(factory):
    @functools.wraps(factory)
    def create(*args, **kwargs):
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _type_for_optimizer(torch_type):
    """megatron's optimizers accept parameters only if their type string says "torch.cuda..."."""

    def type_(self, *args, **kwargs):
        out = torch_type(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not args and not kwargs and caller.startswith("megatron.core.optimizer"):
            return out.replace("torch.", "torch.cuda.", 1)
        return out

    return type_


def _compile(function=None, **_):
    """torch.compile where it is disabled: torch's own imports its compiler nevertheless, for a third of a start."""
    return function or (lambda function: function)


def install() -> None:
    """Answer megatron-core's CUDA calls with the CPU, where there is no CUDA. Idempotent."""
    if PATCHES or torch.cuda.is_available():
        return
    if os.environ.setdefault("TORCH_COMPILE_DISABLE", "1") == "1":  # megatron's jit_fuser is torch.compile
        _replace(torch, "compile", _compile)
    if importlib.util.find_spec("triton") is None:  # 0.19 imports this kernel file from its schedules
        stub = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
        stub.GLOBAL_BLOCK_SIZE, stub.paged_stash_copy_kernel, stub.paged_stash_pop_kernel = 1024, None, None
        sys.modules[stub.__name__] = stub
        PATCHES.append(stub.__name__)
    generator, stream = torch.random.default_generator, _Stream()
    _replace(torch.cuda, "current_device", lambda: torch.device("cpu"))
    _replace(torch.cuda, "synchronize", lambda device=None: None)
    _replace(torch.cuda, "current_stream", lambda device=None: stream)
    _replace(torch.cuda, "manual_seed", generator.manual_seed)
    _replace(torch.cuda, "get_rng_state", lambda device=None: generator.get_state())
    # torch remembers which factories obey `with torch.device("meta")`. Let it see the real ones first: else
    # Hugging Face's from_pretrained, which builds under "meta", leaves position ids as they were in memory.
    torch.utils._device._device_constructors()
    for name in ("tensor", "zeros", "ones"):
        _replace(torch, name, _on_host(getattr(torch, name)))
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.Tensor, "type", _type_for_optimizer(torch.Tensor.type))
    from megatron.core.tensor_parallel import random

    # It warns whenever the CPU's generator moves inside its context, which is what happens here.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    _replace(random, "_get_cuda_rng_state", lambda device=None, clone=False, graph_safe=False: generator.get_state())
    _replace(random, "_set_cuda_rng_state", lambda state, device=None, graph_safe=False: generator.set_state(state))
