"""Takes the tables of a registry to what this version of the server works with."""

import logging

from sqlalchemy import Connection, inspect, text

from redmux.errors import FailedPreconditionError
from redmux_server.registry.schema import HEAD, metadata

_REVISION = "alembic_version"


def migrate(connection: Connection, revision: str = HEAD) -> None:
    """Runs the migrations that are missing, up to `revision`, in the connection's transaction.

    Raises FailedPreconditionError for tables of a later version, or of something else.
    """
    tables = set(inspect(connection).get_table_names())
    current = None
    if _REVISION in tables:
        current = connection.execute(text(f"SELECT version_num FROM {_REVISION}")).scalar()
    elif taken := sorted(tables & set(metadata.tables)):
        raise FailedPreconditionError(
            f"its table {taken[0]} is not the registry's; give the registry a database of its own"
        )
    if current == revision:
        return  # Alembic need not be imported
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "redmux_server.registry:migrations")
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if current is not None and current not in known:
        raise FailedPreconditionError(
            f"its tables are those of a later version of redmux ({current}, this one knows up to "
            f"{HEAD}); upgrade this server"
        )
    command.upgrade(config, revision)
