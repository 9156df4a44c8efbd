"""Converters from other formats to RED adapters."""

from .convert import Converted, Options, convert, convert_tensors
from .target import Target

__all__ = ["Converted", "Options", "Target", "convert", "convert_tensors"]
