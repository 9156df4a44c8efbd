"""Alembic's migrations of the registry, run when it is opened."""
