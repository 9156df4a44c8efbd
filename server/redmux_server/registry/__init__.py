"""Adapters by name: in memory, and in a folder if wanted."""
