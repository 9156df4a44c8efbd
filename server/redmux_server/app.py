"""Server: wires the parts, starts, tells the truth about its health, drains, stops."""

import asyncio
import gc
import logging
import os
import signal
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

import redmux
from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux.v1 import (
    adapter_service_pb2,
    admin_service_pb2,
    inference_service_pb2,
    training_service_pb2,
)
from redmux.v1.adapter_service_pb2_grpc import add_AdapterServiceServicer_to_server
from redmux.v1.admin_service_pb2_grpc import add_AdminServiceServicer_to_server
from redmux.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from redmux.v1.training_service_pb2_grpc import add_TrainingServiceServicer_to_server
from redmux_adapters import read_config
from redmux_adapters.base import resolve
from redmux_adapters.config import CONFIG_NAME
from redmux_adapters.kind import model_kind
from redmux_server.api.generation import GenerationService
from redmux_server.api.interceptor import ApiKeys, Interceptor
from redmux_server.api.reading import ReadableModel, ReadingService
from redmux_server.api.scoring import ScoringService
from redmux_server.api.servicers import AdapterServicer, AdminServicer, InferenceServicer
from redmux_server.api.training_servicer import TrainingServicer
from redmux_server.api.validation import Validator
from redmux_server.config import ServerConfig
from redmux_server.device import Choices, choose
from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.engine import Engine
from redmux_server.engine.reading import Reader
from redmux_server.engine.request import Pooling
from redmux_server.engine.scheduler import Scheduler
from redmux_server.metrics import Metrics
from redmux_server.models.load import BaseModel, load_causal
from redmux_server.models.load_encoder import EncoderModel, load_encoder
from redmux_server.models.load_seq2seq import load_seq2seq
from redmux_server.models.reservation import Reservation
from redmux_server.registry import AdapterRegistry
from redmux_server.training.check import TrainingSetup
from redmux_server.training.service import TrainingService

logger = logging.getLogger(__name__)

_STUCK_S = 30.0
_SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (inference_service_pb2, "InferenceService"),
        (adapter_service_pb2, "AdapterService"),
        (admin_service_pb2, "AdminService"),
        (training_service_pb2, "TrainingService"),
    )
)
_MESSAGE_BYTES = 4 << 20
_JOB_BYTES = 16 << 20  # of a training job's records


class Server:
    """A running server. `start` returns once it serves; `stop` drains it."""

    def __init__(
        self, config: ServerConfig, model: BaseModel | EncoderModel, registry: AdapterRegistry
    ) -> None:
        self.config = config
        self.model = model
        self.registry = registry
        self.metrics = Metrics()
        self.engine = _engine(config, model, self.metrics)
        # One thread: tokenizing a long prompt must not hold up the event loop.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        validator = Validator(model.vocab_size, model.max_context)
        parts = self.engine, registry, model.codec, validator, self.metrics, self._tokenizing
        self.reading = ReadingService(_readable(model), *parts)
        self.generation: GenerationService | None = None
        self.scoring: ScoringService | None = None
        if isinstance(model, BaseModel):
            self.generation = GenerationService(*parts, model.decoder_start)
            self.scoring = ScoringService(self.engine, self.generation, validator, self.metrics)
        self.training = TrainingService(
            _training_setup(config, model), registry, self.metrics,
            max_queued=config.training_queue, share=config.training_share,
            is_busy=lambda: self.engine.num_open > 0, on_publish=self._count_adapters,
        )  # fmt: skip
        self.health = HealthServicer()
        self.port = 0
        self.metrics_port = 0
        self._started_s = time.monotonic()

    @classmethod
    async def start(cls, config: ServerConfig) -> "Server":
        """Loads the model and the adapters, then listens.

        Raises InvalidArgumentError or FailedPreconditionError with what has to change.
        """
        choices = choose(config)
        # The thread ends with the loading: compute threads that wait for its next call would count
        # as competitors of the engine's, which OpenMP then puts to sleep after every product.
        with ThreadPoolExecutor(1, "loader") as loader:
            loading = asyncio.get_running_loop().run_in_executor(loader, _load, config, choices)
            model = await loading
        folder = Path(config.adapter_dir) if config.adapter_dir else None
        registry = AdapterRegistry(
            model.fingerprint, model.sites, folder, config.host_cache_bytes,
            head_size=model.hidden_size if isinstance(model, EncoderModel) else 0,
            head_kinds=model.heads.kinds if isinstance(model, EncoderModel) else (),
        )  # fmt: skip
        for name, path in _adapter_paths(config.adapters):
            registry.load(path, name)
        if folder is not None:
            registry.load_folder()
        server = cls(config, model, registry)
        await server._listen()
        return server

    async def stop(self, drain_s: float | None = None) -> None:
        """Refuses new requests, lets the running ones end for `drain_s` seconds, then stops."""
        await self.health.enter_graceful_shutdown()
        self._watch.cancel()
        await self.training.stop()
        await self.engine.drain(self.config.drain_s if drain_s is None else drain_s)
        await self.engine.stop()
        await self._grpc.stop(1.0)
        self._tokenizing.shutdown(wait=False)
        await asyncio.to_thread(self.registry.save_index)
        self._metrics_server.shutdown()
        self._metrics_server.server_close()
        self._metrics_thread.join()

    async def _listen(self) -> None:
        config = self.config
        keys = ApiKeys(config.api_keys)
        message_bytes = max(_MESSAGE_BYTES, self.registry.max_file_bytes + (1 << 20))
        if self.training.trains:
            message_bytes = max(message_bytes, _JOB_BYTES)
        self._grpc = grpc.aio.server(
            interceptors=[Interceptor(keys)], options=_options(message_bytes)
        )
        add_InferenceServiceServicer_to_server(
            InferenceServicer(self.generation, self.scoring, self.reading, keys), self._grpc
        )
        add_AdapterServiceServicer_to_server(
            AdapterServicer(self.registry, self._count_adapters), self._grpc
        )
        add_AdminServiceServicer_to_server(AdminServicer(self.info), self._grpc)
        add_TrainingServiceServicer_to_server(TrainingServicer(self.training, keys), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._grpc)
        reflection.enable_server_reflection(
            (*_SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
             reflection.SERVICE_NAME), self._grpc,
        )  # fmt: skip
        self.port = self._bind(config)
        try:
            self._metrics_server, self._metrics_thread = start_http_server(
                config.metrics_port, config.host, self.metrics.registry
            )
        except OSError as err:
            raise FailedPreconditionError(
                f"cannot serve metrics on {config.host}:{config.metrics_port}: {err}"
            ) from err
        self.metrics_port = self._metrics_server.server_port
        self._count_adapters()
        self.engine.start()
        await self._grpc.start()
        await self._set_health(serving=True)
        self._watch = asyncio.create_task(self._watch_engine())
        logger.info(
            "serving %s on %s:%d, metrics on port %d, %d adapters",
            config.model, config.host, self.port, self.metrics_port, len(self.registry),
        )  # fmt: skip

    def _bind(self, config: ServerConfig) -> int:
        address = f"{config.host}:{config.port}"
        try:
            if config.tls_cert:
                pair = (Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes())
                port = self._grpc.add_secure_port(address, grpc.ssl_server_credentials([pair]))
            else:
                port = self._grpc.add_insecure_port(address)
        except (RuntimeError, OSError) as err:
            raise FailedPreconditionError(f"cannot listen on {address}: {err}") from err
        is_local = config.host in ("127.0.0.1", "localhost", "::1", "[::1]")
        if not is_local and not (config.tls_cert and config.api_keys):
            logger.warning("%s is not a loopback address; set api_keys and tls_cert", config.host)
        return port

    def _count_adapters(self) -> None:
        self.metrics.adapters.set(len(self.registry))

    async def _set_health(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in ("", *_SERVICES):
            await self.health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def _watch_engine(self) -> None:
        """Keeps the health state true: serving only while steps finish."""
        was_stuck = False
        while True:
            await asyncio.sleep(1.0)
            is_stuck = self.engine.is_stuck(_STUCK_S)
            if is_stuck != was_stuck:
                logger.error("the engine %s", "is stuck" if is_stuck else "works again")
                await self._set_health(serving=not is_stuck)
                was_stuck = is_stuck

    def info(self) -> admin_service_pb2.ServerInfo:
        """Returns what GetServerInfo tells."""
        config, model = self.config, self.model
        return admin_service_pb2.ServerInfo(
            version=redmux.__version__,
            model=config.model,
            base_fingerprint=model.fingerprint,
            architecture=model.architecture,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
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
            num_adapters=len(self.registry),
            num_running=self.engine.num_running,
            num_waiting=max(0, self.engine.num_open - self.engine.num_running),
            uptime_s=time.monotonic() - self._started_s,
            kind=_readable(model).kind,
            trains=self.training.trains,
        )


def _training_setup(config: ServerConfig, model: BaseModel | EncoderModel) -> TrainingSetup | None:
    """Returns what trains on the model's base, None where nothing does."""
    if not config.training:
        return None
    return TrainingSetup(
        model=config.model,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        num_threads=config.threads or len(os.sched_getaffinity(0)),
        fingerprint=model.fingerprint,
        max_tokens=config.training_max_tokens,
    )


def _load(config: ServerConfig, choices: Choices) -> BaseModel | EncoderModel:
    reservation = Reservation(Path(resolve(config.model)), choices)
    match model_kind(read_config(config.model)):
        case "causal":
            return load_causal(config, choices, reservation)
        case "encoder":
            return load_encoder(config, choices)
        case "encoder_decoder":
            return load_seq2seq(config, choices)


def _engine(config: ServerConfig, model: BaseModel | EncoderModel, metrics: Metrics) -> Engine:
    max_open = config.max_running + config.max_queue
    if isinstance(model, BaseModel):
        scheduler = Scheduler(
            BlockPool(model.num_blocks, model.block_size, model.max_idle_blocks),
            max_running=config.max_running,
            max_batch_tokens=model.max_batch_tokens,
            # What a decoder keeps of an answer depends on the source as well.
            prefix_cache=config.prefix_cache and model.decoder_start is None,
        )
        return Engine(model.runner, scheduler, model.bank, metrics, max_open=max_open)
    # Nothing is kept from step to step, so a request holds one block that stands for its place.
    scheduler = Scheduler(
        BlockPool(config.max_running, model.max_context),
        max_running=config.max_running,
        max_batch_tokens=model.max_batch_tokens,
        prefix_cache=False,
        whole_prompts=True,
    )
    reader = Reader(model.heads)
    return Engine(model.runner, scheduler, model.bank, metrics, max_open=max_open, reader=reader)


def _readable(model: BaseModel | EncoderModel) -> ReadableModel:
    if isinstance(model, BaseModel):
        kind = "decoder" if model.decoder_start is None else "encoder_decoder"
        return ReadableModel(kind, model.architecture, model.hidden_size, Pooling.LAST)
    return ReadableModel("encoder", model.architecture, model.hidden_size, Pooling.MEAN)


async def run(config: ServerConfig) -> bool:
    """Serves until SIGTERM or SIGINT, then drains; a second signal cuts the draining short.

    Returns whether it ended well: false if the engine died and somebody should start it again.
    """
    server = await Server.start(config)
    # What is there now stays: a search through it for garbage would stop all streams for 0.2 s.
    gc.freeze()
    gc.enable()
    loop = asyncio.get_running_loop()
    signalled: asyncio.Queue[None] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled.put_nowait, None)
    await _first(signalled.get(), server.engine.died.wait())
    if not server.engine.died.is_set():
        logger.info("draining, at most %g s", config.drain_s)
    stopping = asyncio.create_task(server.stop())
    await _first(asyncio.shield(stopping), signalled.get())
    server.engine.cut_draining()
    await stopping
    logger.info("stopped")
    return not server.engine.died.is_set()


async def _first(*things: Coroutine[Any, Any, Any] | asyncio.Future[None]) -> None:
    """Waits for the first of these and cancels the rest."""
    tasks = [asyncio.ensure_future(thing) for thing in things]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _adapter_paths(entries: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Returns (name, path) of each adapter that the entries of `adapters` stand for."""
    found: list[tuple[str, Path]] = []
    for entry in entries:
        name, separator, text = entry.partition("=")
        path = Path(text if separator else entry).expanduser()
        if entry == "zoo":
            found += [(p.name, p) for p in _subfolders(zoo_folder())]
        elif separator or path.is_file() or (path / CONFIG_NAME).is_file():
            found.append((name if separator else path.stem, path))
        elif path.is_dir():
            found += [(p.name, p) for p in _subfolders(path)]
        else:
            raise InvalidArgumentError(f"adapters: no file or folder {entry!r}")
    return found


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p.parent for p in folder.glob(f"*/{CONFIG_NAME}"))


def zoo_folder() -> Path:
    """Returns the folder of the bundled adapters."""
    import redmux_adapters

    return Path(redmux_adapters.__file__).parent / "zoo"


def _options(message_bytes: int) -> list[tuple[str, int]]:
    """gRPC options: dead peers are found in a minute, floods are bounded, ports are not shared."""
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", _MESSAGE_BYTES),
        ("grpc.max_concurrent_streams", 1024),
        ("grpc.max_allowed_incoming_connections", 4096),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", 300_000),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Without this one a dead peer is noticed a minute late (undocumented, grpcio 1.85).
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.so_reuseport", 0),
        ("grpc.enable_channelz", 0),
    ]
