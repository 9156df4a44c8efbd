"""The commands `redmux serve` and `redmux warm-up`."""

import asyncio
import functools
import gc
import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any

import redmux
from redmux.errors import RedmuxError
from redmux_server.config import ServerConfig, load_config
from redmux_server.descriptors import raise_limit
from redmux_server.doors import Doors
from redmux_server.leaving import EXIT_SOFTWARE, heed_signals

logger = logging.getLogger(__name__)


def serve(argv: Sequence[str]) -> int:
    """Serves until a signal ends it; returns the exit code."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    heed_signals()
    try:
        config = load_config(argv)
        logging.getLogger().setLevel(config.log_level.upper())
        gc.disable()  # until the server has started; it takes a tenth of the imports' time
        return 0 if asyncio.run(_serve(config)) else EXIT_SOFTWARE
    except (RedmuxError, MemoryError) as err:
        print(f"redmux serve: {err}", file=sys.stderr)
        return 1


async def _serve(config: ServerConfig) -> bool:
    logger.info("redmux %s starts with model %s", redmux.__version__, config.model)
    loop = asyncio.get_running_loop()
    raise_limit()  # before the doors take their part of it
    doors = await Doors.open(config)
    if config.api_keys_file:  # not by the loop: closing, it would let those that still come kill
        read_keys = functools.partial(loop.call_soon_threadsafe, doors.read_keys_again)
        signal.signal(signal.SIGHUP, lambda *_: read_keys())
    logger.info(
        "listening on %s:%d, HTTP on port %d, metrics on port %d; health is NOT_SERVING until the "
        "model is loaded",
        config.host, doors.port, doors.http_port, doors.metrics_port,
    )  # fmt: skip
    # Only now: torch takes seconds to import.
    app = await asyncio.to_thread(_import_app, config)
    is_well: bool = await app.run(config, doors)
    return is_well


def _import_app(config: ServerConfig) -> Any:
    importlib.import_module("redmux_server.first_start").compile_ahead(config)
    importlib.import_module("redmux_server.models.lean_imports").import_transformers()
    return importlib.import_module("redmux_server.app")


def warm_up(argv: Sequence[str]) -> int:
    """Does what a first start has to do, for the arguments of `serve`; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        config = load_config(argv)
        _import_app(config)
        device = importlib.import_module("redmux_server.device")
        load = importlib.import_module("redmux_server.models.load").load
        load(config, device.choose(config))
    except (RedmuxError, MemoryError) as err:
        print(f"redmux warm-up: {err}", file=sys.stderr)
        return 1
    folder = importlib.import_module("redmux_adapters.bases.cache").cache_folder()
    print(f"ready to serve {config.model}: what was made for it is in {folder}")
    return 0
