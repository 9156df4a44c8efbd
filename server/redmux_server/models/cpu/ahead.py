"""A process that compiles what Llama-like models need while another one loads the model.

Its arguments are the model and the passes, each the precision of products and the dtype of keys
and values, such as int8:bfloat16; it ends when its standard input does.
"""

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np

from redmux_server.models.cpu import aligned, token_masks
from redmux_server.models.cpu.decoder_pass import SITES, Model, Step, run
from redmux_server.models.cpu.fused_decoder import room_for
from redmux_server.models.cpu.packing import Packing
from redmux_server.models.cpu.paged_attention import KEPT_AS
from redmux_server.models.cpu.reservation import product_shapes

_SIZE = 64


def main(argv: Sequence[str]) -> None:
    """Compiles until all is kept, in the order of the passes."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    model, *passes = argv
    folder = Path(model).expanduser()
    if folder.is_dir() and product_shapes(folder) is None:
        return
    for each in passes:
        run.compile(types_of_pass(*each.split(":")))
    token_masks.make_ready()


def types_of_pass(precision: str, kv_dtype: str) -> tuple[Any, ...]:
    """Returns the types of what a FusedDecoder of this precision hands to `run`."""
    packing = Packing([(_SIZE, _SIZE)] * 5, precision)
    row, rows = _zeros(1), _zeros(1, 1)
    places, whole = _zeros(1, 1, kind=np.int32), _zeros(1, kind=np.int64)
    one = np.float32(1)
    kept = _zeros(1, 1, kind=KEPT_AS[kv_dtype])
    model = Model(rows, one, rows, rows, one, kept, kept, whole, whole, row, whole)
    starts = _zeros(1, len(SITES) + 1, 2, kind=np.int64)
    owners = _zeros(1, kind=np.int32)
    step = Step(rows, row, row, places, places, places, rows, owners, starts, whole, rows)
    return tuple(map(numba.typeof, (1, step, model, packing.packed, room_for(packing, 1))))


def _zeros(*shape: int, kind: type = np.float32) -> aligned.Array:
    return aligned.zeros(shape, kind)


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
