"""Converters from other formats to RED adapters."""

from .delta_vector import convert_delta_vector

__all__ = ["convert_delta_vector"]
