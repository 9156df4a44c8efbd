"""The command `redmux serve`."""

import asyncio
import logging
import sys
from collections.abc import Sequence

from redmux.errors import RedmuxError
from redmux_server.app import run
from redmux_server.config import load_config


def serve(argv: Sequence[str]) -> int:
    """Serves until a signal ends it; returns the exit code."""
    try:
        config = load_config(argv)
        logging.basicConfig(
            level=config.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        )
        asyncio.run(run(config))
    except RedmuxError as err:
        print(f"redmux serve: {err}", file=sys.stderr)
        return 1
    return 0
