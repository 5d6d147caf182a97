"""Times of calls and of the GPU's kernels, for the benchmarks."""

import statistics
import time

import torch

KINDS = {
    "attention": ("flash", "fmha", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "optimizer": ("adam",),
    "compiled": ("triton",),
    "copies and fills": ("memcpy", "memset", "copy", "fill", "cat"),
}


def milliseconds(function, repeats: int = 20, warmup: int = 3) -> float:
    """Median time of a call."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)


def kernels_of(function) -> dict:
    """Milliseconds of one call by kind of kernel, and of its longest kernels."""
    if not torch.cuda.is_available():
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    kinds: dict[str, float] = {}
    longest = []
    for event in profiler.key_averages():
        ms, name = event.self_device_time_total / 1e3, event.key.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "elementwise")
        kinds[kind] = kinds.get(kind, 0.0) + ms
        longest.append((ms, event.count, event.key[:90]))
    return {"kinds": kinds, "longest": sorted(longest, reverse=True)[:20]}
