"""headwater: post-train small language models with few labels."""

__version__ = "0.1.0"
