"""RED adapters as a library: the vectors, their files, and where they belong in a model.

Importing this package imports torch, not transformers.
"""

from .adapter import Adapter, Edit, check_base
from .base import load_base, load_seq2seq_base, read_config
from .config import AdapterMetadata
from .files import Summary, parse_adapter, read_adapter, summarize, to_bytes, write_folder
from .fingerprint import fingerprint
from .head import Head, HeadConfig
from .header import Limits
from .prompt import PromptFormat, Turn
from .sites import (
    Position,
    addressable_sites,
    editable_sites,
    ffn_sites,
    linear_sites,
    red_sites,
    with_layer_norms,
)

__all__ = [
    "Adapter",
    "AdapterMetadata",
    "Edit",
    "Head",
    "HeadConfig",
    "Limits",
    "Position",
    "PromptFormat",
    "Summary",
    "Turn",
    "addressable_sites",
    "check_base",
    "editable_sites",
    "ffn_sites",
    "fingerprint",
    "linear_sites",
    "load_base",
    "load_seq2seq_base",
    "parse_adapter",
    "read_adapter",
    "read_config",
    "red_sites",
    "summarize",
    "to_bytes",
    "with_layer_norms",
    "write_folder",
]
