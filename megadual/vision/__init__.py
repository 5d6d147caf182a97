"""The DualToken image tokenizer."""

from .config import DualTokenConfig
from .tokenizer import DualToken, read_codebooks

__all__ = ["DualToken", "DualTokenConfig", "read_codebooks"]
