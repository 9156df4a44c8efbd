"""Requests, their schedule, and the one thread that steps the model."""
