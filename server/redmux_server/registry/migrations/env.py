"""Runs migrations in the connection and the transaction of whoever asks for them."""

from alembic import context

from redmux_server.registry.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=False,  # the caller's transaction holds all of it
)
context.run_migrations()
