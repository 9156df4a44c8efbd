"""Encoders: packed sequences, and the heads of classifiers."""
