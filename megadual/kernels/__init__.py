"""Triton kernels. Without Triton, as PyTorch for the CPU comes, each is None and callers use PyTorch's operations."""

try:
    from . import nearest_code, normalise
except ImportError:
    nearest_code = normalise = None

__all__ = ["nearest_code", "normalise"]
