"""redmux: the client SDK."""

__version__ = "0.1.0"
