"""Load the configured model: which wing serves it, by its kind."""

import gc
from pathlib import Path

from redmux_adapters import read_config
from redmux_adapters.bases.kind import model_kind
from redmux_adapters.bases.load import check_tokenizer, resolve
from redmux_server.config import ServerConfig
from redmux_server.device import Choices
from redmux_server.models.base_model import BaseModel
from redmux_server.models.compilation import compilation_told
from redmux_server.models.cpu.reservation import Reservation
from redmux_server.models.encoder.load import EncoderModel, load_encoder
from redmux_server.models.lean_imports import without_compiler
from redmux_server.models.load_causal import load_causal
from redmux_server.models.seq2seq.load import load_seq2seq


def load(config: ServerConfig, choices: Choices) -> BaseModel | EncoderModel:
    """Returns the configured model, ready to serve and checked against its plain self.

    Raises InvalidArgumentError if it cannot be found and FailedPreconditionError if it cannot be
    served rightly as configured.
    """
    check_tokenizer(config.model, config.tokenizer)
    reservation = Reservation(Path(resolve(config.model)), choices)
    with compilation_told() as teller, without_compiler():
        loaded = _load(config, choices, reservation)
    if teller.num_compiled:
        # What compiles kernels leaves cycles of garbage, which hold the weights that were loaded
        # meanwhile. Without that a search of half a second would find nothing.
        gc.collect()
    return loaded


def _load(
    config: ServerConfig, choices: Choices, reservation: Reservation
) -> BaseModel | EncoderModel:
    match model_kind(read_config(config.model)):
        case "causal":
            return load_causal(config, choices, reservation)
        case "encoder":
            return load_encoder(config, choices)
        case "encoder_decoder":
            return load_seq2seq(config, choices)
