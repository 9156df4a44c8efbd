"""RED adapters as a library: the vectors, their files, and where they belong in a model.

Importing this package imports torch, not transformers.
"""

from .bases.fingerprint import fingerprint
from .bases.load import load_base, load_seq2seq_base, read_config
from .bases.match import BaseMatch, match_bases
from .bases.sites import (
    Position,
    addressable_sites,
    editable_sites,
    ffn_sites,
    linear_sites,
    red_sites,
    with_layer_norms,
)
from .format.adapter import Adapter, Edit, check_base
from .format.config import AdapterMetadata
from .format.files import Summary, parse_adapter, read_adapter, summarize, to_bytes, write_folder
from .format.head import Head, HeadConfig
from .format.header import Limits
from .format.prompt import PromptFormat, Turn
from .mixing import mix, recipe_digest, recipe_of

__all__ = [
    "Adapter",
    "AdapterMetadata",
    "BaseMatch",
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
    "match_bases",
    "mix",
    "parse_adapter",
    "read_adapter",
    "read_config",
    "recipe_digest",
    "recipe_of",
    "red_sites",
    "summarize",
    "to_bytes",
    "with_layer_norms",
    "write_folder",
]
