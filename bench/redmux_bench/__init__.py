"""Measures a redmux server: `redmux bench`."""
