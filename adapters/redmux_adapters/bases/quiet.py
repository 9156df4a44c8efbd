"""Keeps what transformers prints while it loads from whoever asked for something else."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def quietly(*, reports: bool = False) -> Iterator[None]:
    """Shows no progress bars of transformers meanwhile, and its warnings only with `reports`.

    One of the warnings lists the weights that a checkpoint lacks: whoever turns it off looks at
    `missing_keys`.
    """
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    if not reports:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
