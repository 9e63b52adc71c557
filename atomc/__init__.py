"""atomc: a compiler and serving runtime for DeepSeek-V4."""

__version__ = "0.1.0"
