"""thornback: post-train language models on several rewards at once, and serve them, on one Ray cluster."""

__version__ = "0.1.0"
