"""The command `redmux serve`."""

import asyncio
import gc
import logging
import sys
from collections.abc import Sequence

from redmux.errors import RedmuxError
from redmux_server.config import load_config

_EXIT_SOFTWARE = 70  # sysexits.h: an internal error; a supervisor should start us again


def serve(argv: Sequence[str]) -> int:
    """Serves until a signal ends it; returns the exit code."""
    try:
        config = load_config(argv)
        logging.basicConfig(
            level=config.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        )
        gc.disable()  # until `run` has started the server; it takes a tenth of the imports' time
        from redmux_server.app import run  # torch takes seconds to import: mistakes answer first

        return 0 if asyncio.run(run(config)) else _EXIT_SOFTWARE
    except RedmuxError as err:
        print(f"redmux serve: {err}", file=sys.stderr)
        return 1
