"""Encoder-decoders: T5 and mT5."""
