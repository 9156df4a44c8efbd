"""What a server is made of: its registry, engine and services, wired as configured."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from redmux_server.batches.service import BatchService
from redmux_server.config import ServerConfig
from redmux_server.device import name_of
from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.drafts import Drafts
from redmux_server.engine.engine import Engine
from redmux_server.engine.reading import Reader
from redmux_server.engine.request import Pooling
from redmux_server.engine.scheduler import Scheduler
from redmux_server.fair_thread import FairThread
from redmux_server.files.store import FileStore
from redmux_server.metrics import Metrics
from redmux_server.models.base_model import BaseModel
from redmux_server.models.encoder.load import EncoderModel
from redmux_server.registry.database import Database
from redmux_server.registry.folder import AdapterFolder
from redmux_server.registry.given import GivenAdapter
from redmux_server.registry.registry import AdapterRegistry
from redmux_server.services.generation import GenerationService
from redmux_server.services.grammar import Grammars
from redmux_server.services.pinning import Pins
from redmux_server.services.reading import ReadableModel, ReadingService
from redmux_server.services.scoring import ScoringService
from redmux_server.services.tokens import TokenService
from redmux_server.services.validation import Validator
from redmux_server.training.check import TrainingSetup
from redmux_server.training.service import TrainingService
from redmux_server.tuning.service import TuningService


@dataclass(frozen=True, slots=True)
class Services:
    """What every door offers; those that the model has no use for are None."""

    generation: GenerationService | None
    scoring: ScoringService | None
    reading: ReadingService
    tokens: TokenService
    validator: Validator


@dataclass(frozen=True, slots=True)
class Desk:
    """Files of callers, and the work on them whose results are fetched later."""

    files: FileStore
    batches: BatchService
    tuning: TuningService


def make_services(
    model: BaseModel | EncoderModel, engine: Engine, registry: AdapterRegistry, metrics: Metrics,
    tokenizing: FairThread, compiling: FairThread, *, allow_request_template: bool = False,
) -> Services:  # fmt: skip
    """Returns the services of this model; they tokenize and compile grammars in these threads."""
    validator = Validator(model.vocab_size, model.max_context, allow_request_template)
    parts = engine, Pins(registry), model.codec, validator, metrics, tokenizing
    reading = ReadingService(readable(model), *parts)
    if not isinstance(model, BaseModel):
        tokens = TokenService(model.codec, validator, None)
        return Services(None, None, reading, tokens, validator)
    grammars = Grammars(model.codec, model.vocab_size, compiling)
    generation = GenerationService(*parts, grammars, model.decoder_start)
    scoring = ScoringService(engine, generation, validator, metrics)
    tokens = TokenService(model.codec, validator, generation)
    return Services(generation, scoring, reading, tokens, validator)


def make_training(
    config: ServerConfig, model: BaseModel | EncoderModel, engine: Engine,
    registry: AdapterRegistry, metrics: Metrics, on_publish: Callable[[], None],
) -> TrainingService:  # fmt: skip
    """Returns what trains beside this engine and gives way to it."""
    return TrainingService(
        _training_setup(config, model), registry, metrics,
        max_queued=config.training_queue, share=config.training_share,
        is_busy=lambda: engine.num_open > 0, on_publish=on_publish,
    )  # fmt: skip


def open_files(config: ServerConfig) -> FileStore:
    """Returns the files that earlier runs kept, and where further ones go; blocks on the disk."""
    return FileStore(_data_folder(config, "files"))


def make_desk(config: ServerConfig, files: FileStore, training: TrainingService) -> Desk:
    """Returns what takes work that is fetched later; batches get half of the rows of a step."""
    num_at_once = max(1, config.max_running // 2)
    return Desk(
        files, BatchService(files, _data_folder(config, "batches"), num_at_once),
        TuningService(training, files, _data_folder(config, "fine_tuning")),
    )  # fmt: skip


def _data_folder(config: ServerConfig, name: str) -> Path | None:
    return Path(config.data_dir) / name if config.data_dir else None


def open_database(config: ServerConfig) -> Database:
    """Returns where adapters are kept; blocks. Raises where it cannot be opened, and why."""
    if config.registry:
        return Database.at(config.registry)
    return Database.in_folder(Path(config.data_dir)) if config.data_dir else Database.in_memory()


def open_registry(
    config: ServerConfig, model: BaseModel | EncoderModel, database: Database,
    given: Iterable[GivenAdapter],
) -> AdapterRegistry:  # fmt: skip
    """Returns the registry with the adapters that are kept and those given at start.

    Raises for a given one that does not fit the model.
    """
    registry = AdapterRegistry(
        model.fingerprint, model.sites, database, config.host_cache_bytes,
        head_size=model.hidden_size if isinstance(model, EncoderModel) else 0,
        head_kinds=model.heads.kinds if isinstance(model, EncoderModel) else (),
        check_format=model.codec.check_format,
        allow_other_base=config.allow_other_base,
        has_windows=isinstance(model, BaseModel) and model.decoder_start is None,
    )  # fmt: skip
    for adapter in given:
        registry.load(adapter)
    return registry


def open_folder(config: ServerConfig, registry: AdapterRegistry) -> AdapterFolder | None:
    """Publishes the files of the adapter folder and returns it, if there is one; blocks."""
    if not config.adapter_dir:
        return None
    folder = AdapterFolder(Path(config.adapter_dir), registry.rules)
    registry.follow(folder.open_all())
    return folder


def make_engine(config: ServerConfig, model: BaseModel | EncoderModel, metrics: Metrics) -> Engine:
    """Returns the engine of this model, not yet started."""
    max_open = config.max_running + config.max_queue
    if isinstance(model, BaseModel):
        scheduler = Scheduler(
            BlockPool(model.num_blocks, model.block_size, model.max_idle_blocks),
            max_running=config.max_running,
            max_batch_tokens=model.max_batch_tokens,
            # What a decoder keeps of an answer depends on the source as well.
            prefix_cache=config.prefix_cache and model.decoder_start is None,
        )
        drafts = Drafts(model.max_batch_tokens) if _may_draft(config, model) else None
        return Engine(
            model.runner, scheduler, model.bank, metrics, max_open=max_open, drafts=drafts,
            bar=model.bar,
        )  # fmt: skip
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


def _may_draft(config: ServerConfig, model: BaseModel) -> bool:
    """Whether drafts are wanted and change nothing but time, because rows have their own bits.

    On a GPU steps of one token for each request are captured, others are launched one by one.
    """
    is_exact = model.bit_identical and model.decoder_start is None
    return config.drafts == "auto" and is_exact and model.device.type == "cpu"


def readable(model: BaseModel | EncoderModel) -> ReadableModel:
    """Returns what reading has to know of this model."""
    if isinstance(model, BaseModel):
        kind = "decoder" if model.decoder_start is None else "encoder_decoder"
        return ReadableModel(kind, model.architecture, model.hidden_size, Pooling.LAST)
    return ReadableModel("encoder", model.architecture, model.hidden_size, Pooling.MEAN)


def _training_setup(config: ServerConfig, model: BaseModel | EncoderModel) -> TrainingSetup | None:
    """Returns what trains on the model's base, None where nothing does."""
    if not config.training:
        return None
    return TrainingSetup(
        model=config.model,
        tokenizer=config.tokenizer,
        device=str(model.device),
        dtype=name_of(model.dtype),
        num_threads=config.threads or len(os.sched_getaffinity(0)),
        fingerprint=model.fingerprint,
        max_tokens=config.training_max_tokens,
    )
