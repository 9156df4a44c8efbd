"""Decoders that transformers defines: attention over our cache, steps, and the proof at start."""
