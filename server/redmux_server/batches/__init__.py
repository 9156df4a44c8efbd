"""Batches: files of requests that are answered when nobody else asks."""
