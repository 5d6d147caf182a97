"""The DualToken image tokenizer."""

from .config import DualTokenConfig, StreamConfig
from .tokenizer import CodebookSet, DualToken, read_codebooks

__all__ = ["CodebookSet", "DualToken", "DualTokenConfig", "StreamConfig", "read_codebooks"]
