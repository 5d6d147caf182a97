"""MegaDual: pretraining of unified multimodal LLMs on DualToken codes."""

__version__ = "0.1.0"
