"""Generative models whose samples you can check."""

__version__ = "0.1.0"
