"""What MegaDual uses of DeepSpeed that its documentation does not promise: all of it.

An engine asks for it as it is built, so what a version lacks is told then.
"""

import functools
import types

import torch
from deepspeed import ops
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from megadual.engine.internals import reach

_reach = functools.partial(reach, "deepspeed", "0.17 to 0.19.x")


def without_compiling() -> None:
    """Let gloo do the collectives on CPUs; DeepSpeed's own would be compiled first."""
    _reach(ops, "__compatible_ops__")["deepspeed_shm_comm"] = False


def own_stage(pipeline: torch.nn.Module) -> torch.nn.Module:
    """The one layer of a PipelineModule that this rank has."""
    (stage,) = _reach(pipeline, "forward_funcs")
    return stage


def adamw(engine) -> torch.optim.Optimizer:
    """The AdamW inside an engine's ZeRO optimizer."""
    return _reach(engine, "optimizer", "optimizer")


def flat_weights(engine, stage: int) -> list[torch.Tensor]:
    """This rank's shares of the fp32 weights, one for each group of parameters: what AdamW of ZeRO-`stage` updates."""
    zero = engine.optimizer
    if stage == 3:
        return _reach(zero, "fp32_partitioned_groups_flat")
    in_bf16 = isinstance(zero, BF16_Optimizer)  # what stage 1 is then
    return _reach(zero, "fp32_groups_flat_partition" if in_bf16 else "single_partition_of_fp32_groups")


def show_moments(engine, stage: int) -> None:
    """Give parameters their views of AdamW's state, which `safe_get_full_optimizer_state` reads."""
    if stage < 3:
        _reach(engine.optimizer, "_lazy_init_hp_params_optimizer_state")()


def show_main_grads(engine) -> bool:
    """Let backward add weights' gradients to ZeRO-1's fp32 sums itself (megadual/model/main_grad.py); true if it can.

    It can in bf16 runs, where DeepSpeed would have each micro-batch's in bf16 and add them in kernels of its own. It
    still does so for those that nothing adds, and those that tensor-parallel ranks first sum.
    """
    zero = engine.optimizer
    if not isinstance(zero, BF16_Optimizer):
        return False
    parameters = _reach(zero, "bf16_groups")
    for group, sums in zip(parameters, _reach(zero, "fp32_groups_gradients"), strict=True):
        for parameter, flat in zip(group, sums, strict=True):
            if not getattr(parameter, "sequence_parallel", False):
                parameter.main_grad, parameter.grad_added_to_main_grad = flat.view(parameter.shape), False
    theirs = _reach(zero, "_update_hp_grad")

    def update(self, parameter: torch.nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        if getattr(parameter, "grad_added_to_main_grad", False):
            parameter.grad_added_to_main_grad = False
            parameter._hp_grad = self.fp32_groups_gradients[group][index]
            self.fp32_groups_has_gradients[group][index] = True
        else:
            theirs(parameter, group, index, clear_lp_grads)

    zero._update_hp_grad = types.MethodType(update, zero)
    return True
