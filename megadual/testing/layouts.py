"""The layouts that must train as one process does, and by how much their results differ from it."""

_SP, _RECOMPUTE, _VPP = "parallel.sequence=true", "train.recompute=true", "parallel.virtual_pipeline=2"
_TP, _PP, _CP = "parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2"
_AHEAD = "parallel.run_ahead=1"
_FEW_DRAWN = "train.drawn_at_once=5"  # of the dozens of a micro-batch
_ZERO = {stage: ["engine=deepspeed", f"parallel.zero_stage={stage}"] for stage in (1, 2, 3)}

# name -> (processes, overrides of testing.tiny.tiny_run); what is left of the processes is data parallel.
LAYOUTS = {
    "TP2": (2, [_TP]),
    "TP4": (4, ["parallel.tensor=4"]),
    "TP2+SP": (2, [_TP, _SP]),
    "PP2": (2, [_PP]),
    "PP4": (4, ["parallel.pipeline=4"]),
    "PP4, heads alone": (4, ["parallel.pipeline=4", "parallel.stage_layers=[2,1,1,0]"]),
    "PP2, ahead": (2, [_PP, _AHEAD, _FEW_DRAWN]),
    "PP2xVPP2": (2, [_PP, _VPP]),
    "DP2": (2, []),
    "DP4": (4, []),
    "TP2xPP2": (4, [_TP, _PP]),
    "TP2xPP2+SP": (4, [_TP, _PP, _SP]),
    "TP2xDP2, micro-batch 2": (4, [_TP, "train.micro_batch_size=2"]),
    "TP2xPP2+SP, ahead": (4, [_TP, _PP, _SP, _AHEAD]),
    "TP2xPP2xDP2": (8, [_TP, _PP]),
    "TP2xPP2xDP2+SP": (8, [_TP, _PP, _SP]),
    "TP2xPP2xDP2+SP+recompute": (8, [_TP, _PP, _SP, _RECOMPUTE, _FEW_DRAWN]),
    "TP2xPP2xDP2+SP+VPP2": (8, [_TP, _PP, _SP, _VPP]),
    "CP2": (2, [_CP]),
    "CP4": (4, ["parallel.context=4"]),
    "CP2xDP2": (4, [_CP]),
    "TP2xCP2": (4, [_TP, _CP]),
    "TP2xCP2+SP": (4, [_TP, _CP, _SP]),
    "PP2xCP2+recompute": (4, [_PP, _CP, _RECOMPUTE]),
    "TP2xPP2xCP2+SP": (8, [_TP, _PP, _CP, _SP]),
    "DeepSpeed ZeRO-1 DP2": (2, _ZERO[1]),
    "DeepSpeed ZeRO-2 DP2": (2, _ZERO[2]),
    "DeepSpeed ZeRO-3 DP2": (2, _ZERO[3]),
    "DeepSpeed ZeRO-1 TP2xDP2+SP": (4, [*_ZERO[1], _TP, _SP, _FEW_DRAWN]),
    "DeepSpeed ZeRO-2 TP2xDP2": (4, [*_ZERO[2], _TP]),
    "DeepSpeed ZeRO-3 TP2xDP2+SP": (4, [*_ZERO[3], _TP, _SP]),
    "DeepSpeed PP2": (2, [*_ZERO[1], _PP]),
    "DeepSpeed TP2xPP2xDP2": (8, [*_ZERO[1], _TP, _PP]),
    "DeepSpeed TP2xPP2xDP2+SP": (8, [*_ZERO[1], _TP, _PP, _SP, _FEW_DRAWN]),
}
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-3}


def differences(got: list[dict], expected: list[dict]) -> tuple[float, float]:
    """Over the steps: largest difference of the total's or one of its losses, and of the gradient norm, relative."""
    pairs = list(zip(got, expected, strict=True))
    losses = [name for name in expected[0] if name.startswith("loss")]
    return (
        max(abs(a[name] - b[name]) for a, b in pairs for name in losses),
        max(abs(a["grad_norm"] - b["grad_norm"]) / b["grad_norm"] for a, b in pairs),
    )
