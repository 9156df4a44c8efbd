"""Server: starts, tells the truth about its health, drains, stops."""

import asyncio
import contextlib
import functools
import gc
import importlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import redmux
from redmux.v1 import admin_service_pb2
from redmux_server.config import ServerConfig
from redmux_server.device import choose, name_of
from redmux_server.doors import Doors
from redmux_server.fair_thread import FairThread
from redmux_server.files.store import FileStore
from redmux_server.grpc_api.methods import add_methods, message_limits
from redmux_server.http_api.batch_lines import line_answerer
from redmux_server.http_api.gauges import GatewayGauges
from redmux_server.http_api.names import ModelNames
from redmux_server.http_api.offer import Offer
from redmux_server.leaving import EXIT_SOFTWARE, Leaving, stop_loading
from redmux_server.load import load_message
from redmux_server.metrics_port import State
from redmux_server.models.base_model import BaseModel
from redmux_server.models.encoder.load import EncoderModel
from redmux_server.models.load import load
from redmux_server.models.settle import settle
from redmux_server.registry.database import Database
from redmux_server.registry.folder import AdapterFolder, FolderChanges
from redmux_server.registry.folder_lock import FolderLock
from redmux_server.registry.given import read_given
from redmux_server.registry.registry import AdapterRegistry
from redmux_server.registry.tenants import sees_all
from redmux_server.wiring import (
    make_desk,
    make_engine,
    make_services,
    make_training,
    open_database,
    open_files,
    open_folder,
    open_registry,
    readable,
)

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
_STUCK_LOOKS = 30  # at one step, until it counts as hung
_STEP_S = 5.0  # that a stop waits for the step under way


class Server:
    """A running server. `start` returns once it serves; `stop` drains it."""

    def __init__(
        self, config: ServerConfig, doors: Doors, model: BaseModel | EncoderModel,
        registry: AdapterRegistry, folder: AdapterFolder | None, files: FileStore,
        locks: Sequence[FolderLock] = (),
    ) -> None:  # fmt: skip
        """`locks` are those of its folders, released when the server has stopped."""
        self._folder = folder
        self._locks = locks
        self.config = config
        self.doors = doors
        self.model = model
        self.registry = registry
        self.metrics = doors.metrics
        self.engine = make_engine(config, model, self.metrics)
        # One thread: tokenizing a long prompt must not hold up the event loop.
        self._tokenizing = FairThread("tokenizer")
        self._compiling = FairThread("grammars")
        self.services = make_services(
            model, self.engine, registry, self.metrics, self._tokenizing, self._compiling,
            allow_request_template=config.allow_request_template,
        )  # fmt: skip
        self.training = make_training(
            config, model, self.engine, registry, self.metrics, self._count_adapters
        )
        self.desk = make_desk(config, files, self.training)
        self.names = ModelNames(config.model, config.served_model_name, registry)
        gauges = GatewayGauges(self.names.base, config.max_running, self.engine, registry)
        gauges.register(self.metrics.registry)
        # Where the model lies is the operator's to know.
        is_file = Path(config.model).expanduser().exists()
        self._model_name = Path(config.model).name if is_file else config.model
        self._following: asyncio.Task[None] | None = None
        self._is_draining = False
        self._is_stuck = False
        self._started_s = time.monotonic()

    @classmethod
    async def start(cls, config: ServerConfig, doors: Doors | None = None) -> "Server":
        """Loads the model and the adapters behind doors that are open, then serves.

        Raises InvalidArgumentError or FailedPreconditionError with what has to change; the doors
        are closed then.
        """
        doors = doors or await Doors.open(config)
        logger.info("loading %s", config.model)
        locks: list[FolderLock] = []
        database: Database | None = None
        try:
            choices = choose(config)
            # What can be wrong with adapters is told before the model takes its time.
            # The thread ends with the loading: compute threads that wait for its next call would
            # count as competitors of the engine's, which OpenMP then puts to sleep after every
            # product. Adapters are read in it, too, so that the doors answer meanwhile.
            with ThreadPoolExecutor(1, "loader") as loader:
                in_loader = functools.partial(asyncio.get_running_loop().run_in_executor, loader)
                given = await in_loader(read_given, config.adapters)
                if config.data_dir:
                    locks.append(FolderLock(Path(config.data_dir)))
                database = await in_loader(open_database, config)
                # FastAPI takes a while to be imported, which is the loading's time otherwise.
                importing = asyncio.to_thread(importlib.import_module, "redmux_server.http_api.app")
                model, _ = await asyncio.gather(in_loader(load, config, choices), importing)
                registry = await in_loader(open_registry, config, model, database, given)
                folder = await in_loader(open_folder, config, registry)
                files = await in_loader(open_files, config)
            server = cls(config, doors, model, registry, folder, files, locks)
            await server._serve()
        except BaseException:
            await doors.close()
            if database is not None:
                database.close()
            for lock in locks:
                lock.close()
            raise
        return server

    @property
    def port(self) -> int:
        """The port of gRPC."""
        return self.doors.port

    @property
    def http_port(self) -> int:
        """The port of HTTP, -1 where there is none."""
        return self.doors.http_port

    @property
    def metrics_port(self) -> int:
        """The port of /metrics."""
        return self.doors.metrics_port

    async def stop(self, drain_s: float | None = None) -> None:
        """Refuses new requests, lets the running ones end for `drain_s` seconds, then stops."""
        self._is_draining = True
        await self.doors.grpc.health.enter_graceful_shutdown()
        self._watch.cancel()
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
        await self.desk.batches.stop()
        await self.training.stop()
        await self.desk.tuning.stop()
        self._compiling.close()
        self._tokenizing.close()  # what is not in the engine yet would be refused there
        await self.engine.drain(self.config.drain_s if drain_s is None else drain_s)
        await self.engine.stop(_STEP_S)
        await self.doors.close()
        await self.registry.close()
        for lock in self._locks:
            lock.close()

    async def _serve(self) -> None:
        doors = self.doors
        add_methods(
            doors.grpc.methods, doors.keys, self.services, self.registry, self.training, self.info,
            self._count_adapters,
        )  # fmt: skip
        self._count_adapters()
        self.engine.start()
        await doors.grpc.serve(message_limits(self.registry, self.training))
        if doors.http_port >= 0:
            from redmux_server.http_api.app import body_limits, make_app

            offer = self._offer()
            app = make_app(offer)
            await self.desk.tuning.start()
            await self.desk.batches.start(line_answerer(app))
            doors.http.serve(app, body_limits(offer))
        doors.state = lambda: self.state
        self._watch = asyncio.create_task(self._watch_engine())
        if self._folder is not None:
            self._following = asyncio.create_task(self._folder.watch(self._follow))
        logger.info(
            "serving %s on %s:%d, HTTP on port %d, metrics on port %d, %d adapters",
            self.config.model, self.config.host, self.port, self.http_port, self.metrics_port,
            len(self.registry),
        )  # fmt: skip

    def _offer(self) -> Offer:
        """Returns what HTTP serves from."""
        config, model = self.config, self.model
        return Offer(
            config, self.services, self.desk, self.engine, self.metrics, self.registry, self.names,
            model.codec, self.doors.health, model.fingerprint,
            int(time.time()), self._count_adapters,
        )  # fmt: skip

    @property
    def state(self) -> State:
        """What the server does right now."""
        if self.engine.died.is_set():
            return State.DEAD
        if self._is_draining:
            return State.DRAINING
        return State.STUCK if self._is_stuck else State.SERVING

    def _follow(self, changes: FolderChanges) -> None:
        self.registry.follow(changes)
        self._count_adapters()

    def _count_adapters(self) -> None:
        self.metrics.adapters.set(len(self.registry))

    async def _watch_engine(self) -> None:
        """Keeps the health state true: serving only while steps finish.

        Counts looks and not seconds: a process that was stopped for a while is not stuck.
        """
        step, num_looks = None, 0
        while True:
            await asyncio.sleep(_LOOK_S)
            last, step = step, self.engine.step_under_way
            num_looks = num_looks + 1 if step is not None and step == last else 0
            is_stuck = num_looks >= _STUCK_LOOKS or not self.engine.is_alive
            if is_stuck != self._is_stuck:
                logger.error("the engine %s", "is stuck" if is_stuck else "works again")
                self._is_stuck = is_stuck
                await self.doors.grpc.set_serving(not is_stuck)
                if is_stuck and self.engine.is_alive:
                    self.engine.give_up_step()

    async def info(self, tenant: str = "") -> admin_service_pb2.ServerInfo:
        """Returns what GetServerInfo tells a tenant."""
        config, model = self.config, self.model
        return admin_service_pb2.ServerInfo(
            version=redmux.__version__,
            model=config.model if sees_all(tenant) else self._model_name,
            base_fingerprint=model.fingerprint,
            architecture=model.architecture,
            device=str(model.device),
            dtype=name_of(model.dtype),
            choices=model.reasons,
            bit_identical=model.bit_identical,
            vocab_size=model.vocab_size,
            max_context=model.max_context,
            max_running=config.max_running,
            max_batch_tokens=model.max_batch_tokens,
            max_queue=config.max_queue,
            kv_cache_tokens=(
                model.num_blocks * model.block_size if isinstance(model, BaseModel) else 0
            ),
            num_adapters=await self.registry.count(tenant),
            num_running=self.engine.num_running,
            num_waiting=max(0, self.engine.num_open - self.engine.num_running),
            uptime_s=time.monotonic() - self._started_s,
            kind=readable(model).kind,
            trains=self.training.trains,
            load=load_message(self.metrics),
        )


async def run(config: ServerConfig, doors: Doors) -> bool:
    """Serves until SIGTERM or SIGINT, then drains; a second signal cuts the draining short.

    The process ends ten seconds after the draining whatever hangs, three after a second signal.
    Returns whether it ended well: false if the engine died or hung and somebody should start it
    again.
    """
    loop = asyncio.get_running_loop()
    # Events, not a queue: whoever waits for two things at once could take a signal and lose it.
    leave, leave_now = asyncio.Event(), asyncio.Event()

    def hear() -> None:
        (leave_now if leave.is_set() else leave).set()

    def in_loop(callback: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            loop.call_soon_threadsafe(callback)

    leaving = Leaving(
        config.drain_s, lambda: in_loop(hear),
        (lambda: in_loop(doors.read_keys_again)) if config.api_keys_file else None,
    )  # fmt: skip
    starting = asyncio.create_task(Server.start(config, doors))
    await _first(asyncio.shield(starting), leave.wait())
    if not starting.done():
        stop_loading()
    server = starting.result()
    # What is there now stays: a search through it for garbage would stop all streams for 0.2 s.
    settle()
    gc.freeze()
    gc.enable()
    await _first(leave.wait(), server.engine.died.wait())
    if server.engine.died.is_set():
        leaving.begin()
        leave.set()  # as if somebody had said so
    else:
        logger.info("draining, at most %g s", config.drain_s)
    stopping = asyncio.create_task(server.stop())
    await _first(asyncio.shield(stopping), leave_now.wait())
    server.engine.cut_draining()
    await stopping
    logger.info("stopped")
    gc.unfreeze()  # else libraries find their objects left at the end, and say so
    is_well = not server.engine.died.is_set() and not server.engine.is_alive
    leaving.stopped(0 if is_well else EXIT_SOFTWARE)
    return is_well


async def _first(*things: Coroutine[Any, Any, Any] | asyncio.Future[Any]) -> None:
    """Waits for the first of these and cancels the rest."""
    tasks = [asyncio.ensure_future(thing) for thing in things]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
