"""The DualToken image tokenizer."""

from .config import DualTokenConfig, StreamConfig
from .tokenizer import CodebookSet, DualToken, Encoded, read_codebooks, to_image

__all__ = ["CodebookSet", "DualToken", "DualTokenConfig", "Encoded", "StreamConfig", "read_codebooks", "to_image"]
