"""One pass of a whole Llama-like decoder as one compiled call, without Python between its parts.

Every thread walks all layers; `phases` keep them together. So the interpreter is asked for its
lock once per step, where a call per kernel would wait for it hundreds of times beside a busy
server, and threads are started once.
"""

from typing import NamedTuple

import numpy as np
from numba import prange

from redmux_server.models.cpu.aligned import scratch
from redmux_server.models.cpu.arithmetic import PANEL
from redmux_server.models.cpu.compiled import compiled
from redmux_server.models.cpu.packed_linear import TALL, multiply_some
from redmux_server.models.cpu.paged_attention import attend_some
from redmux_server.models.cpu.phases import counters_of
from redmux_server.models.cpu.row_kernels import (
    add_norm_some,
    edit_some,
    gate_some,
    narrow_some,
    norm_some,
    pick_some,
)
from redmux_server.models.cpu.tiles import configure, release
from redmux_server.models.cpu.vector import Array

LINEARS_PER_LAYER = 4  # q k v, o, gate up, down
# Of `Step.starts`: where the vectors of a layer's sites lie in a row of the bank.
SITES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "",  # the layer itself: the residual behind its FFN
)  # fmt: skip
_QKV, _O, _GATE_UP, _DOWN, _SUM, _NOWHERE = slice(0, 3), 3, slice(4, 6), 6, 7, 8
_PHASES_PER_LAYER = 11


class Model(NamedTuple):
    """All of the layers but their products; fp32 unless said otherwise."""

    norms: Array  # [2 * layers + 1, hidden]: before attention, before the FFN, ..., the last
    eps: np.float32
    q_norms: Array  # [layers, head_dim], or [layers, 0] for none
    k_norms: Array
    head_eps: np.float32  # of q_norms and k_norms
    keys: Array  # [layers, all of a layer]
    values: Array
    layout: Array  # PagedAttention.packed_layout
    widths: Array  # int64 [3]: outputs of q, k and v
    scales: Array  # [layers], of attention scores
    windows: Array  # int64 [layers], visible keys, 0 for all


class Step(NamedTuple):
    """The tokens of one step."""

    x: Array  # [tokens, hidden], embeddings; becomes the residual
    cos: Array  # [tokens * head_dim]
    sin: Array
    places: Array  # see StepIndex
    table: Array
    tiles: Array
    rows: Array  # [bank rows, width], the vectors of adapters
    row_of: Array  # int32 [tokens]
    # int64 [layers, sites, 2]: the edit and the LayerNorm behind it, -1 where nobody has one;
    # behind the sites one that nobody edits.
    starts: Array
    last: Array  # int64, the rows that go to the head
    logits: Array  # [len(last), vocab], filled; [0, vocab] leaves the head out


class Room(NamedTuple):
    """What a pass computes on its way, for as many tokens as a step may have.

    The narrow arrays are what products take, with spare rows behind them, as `steps` has; with
    products of fp32 they are the arrays that they are rounded from.
    """

    h: Array  # [tokens, hidden]
    qkv: Array
    attended: Array
    y: Array  # [tokens, hidden]
    gate_up: Array
    gated: Array
    narrow_h: Array
    narrow_attended: Array
    narrow_gated: Array
    steps: Array  # [tokens, parts], of narrow rows
    x: Array  # Step.x, narrow_attended, its steps and Step.row_of of the rows that go to the head
    picked: Array
    picked_steps: Array
    row_of: Array


@compiled
def _attend(counters, thread, step, model, linears, room, layer, sums):
    """From narrow_h to narrow_attended."""
    n = len(step.x)
    qkv = room.qkv[:n]
    multiply_some(
        counters[0], thread, room.narrow_h[:n], room.steps, linears,
        layer * LINEARS_PER_LAYER, qkv, sums,
    )  # fmt: skip
    starts = step.starts[layer, _QKV]
    if starts.max() >= 0:
        edit_some(counters[1], thread, qkv, model.widths, step.rows, step.row_of, starts)
    flat = qkv.reshape(-1)
    attend_some(
        counters[2:4], thread, flat, flat, flat, model.keys[layer], model.values[layer],
        room.attended.reshape(-1), step.cos, step.sin, model.q_norms[layer], model.k_norms[layer],
        model.head_eps, model.layout, step.places, step.table, step.tiles,
        model.scales[layer], model.windows[layer], np.float32(0),
    )  # fmt: skip
    narrow_some(counters[4], thread, room.attended[:n], room.narrow_attended[:n], room.steps)


@compiled
def _feed(
    counters, thread, step, x, attended, attended_steps, row_of, model, linears, room, layer, sums
):
    """From narrow attended to narrow_h of the next layer; x is the residual."""
    n, i = len(x), layer * LINEARS_PER_LAYER
    h, y, narrow_h, steps = room.h[:n], room.y[:n], room.narrow_h[:n], room.steps
    multiply_some(counters[0], thread, attended, attended_steps, linears, i + 1, y, sums)
    starts = step.starts[layer]
    add_norm_some(
        counters[1], thread, x, y, step.rows, row_of, starts[_O], starts[_NOWHERE],
        model.norms[2 * layer + 1], model.eps, h, narrow_h, steps,
    )  # fmt: skip
    gate_up, gated, narrow_gated = room.gate_up[:n], room.gated[:n], room.narrow_gated[:n]
    multiply_some(counters[2], thread, narrow_h, steps, linears, i + 2, gate_up, sums)
    gate_some(
        counters[3], thread, gate_up, step.rows, row_of, starts[_GATE_UP], gated, narrow_gated,
        steps,
    )  # fmt: skip
    multiply_some(counters[4], thread, narrow_gated, steps, linears, i + 3, y, sums)
    add_norm_some(
        counters[5], thread, x, y, step.rows, row_of, starts[_DOWN], starts[_SUM],
        model.norms[2 * layer + 2], model.eps, h, narrow_h, steps,
    )  # fmt: skip


@compiled
def _walk(counters, thread, step, model, linears, room):
    sums = scratch(TALL * PANEL)
    configure(linears.tiles)
    n, num_layers = len(step.x), len(model.scales)
    x, attended, steps, row_of = step.x, room.narrow_attended[:n], room.steps, step.row_of
    norm_some(
        counters[0], thread, x, model.norms[0], model.eps, room.h[:n], room.narrow_h[:n],
        room.steps,
    )  # fmt: skip
    for layer in range(num_layers):
        first = 2 + layer * _PHASES_PER_LAYER
        _attend(counters[first : first + 5], thread, step, model, linears, room, layer, sums)
        if layer == num_layers - 1 and len(step.last) < n:
            # Only rows that are sampled go on; the others have left their keys and values.
            m = len(step.last)
            pick_some(
                counters[1], thread, step.last, x, attended, steps, row_of,
                room.x[:m], room.picked[:m], room.picked_steps, room.row_of[:m],
            )  # fmt: skip
            x, attended, row_of = room.x[:m], room.picked[:m], room.row_of[:m]
            steps = room.picked_steps
        _feed(
            counters[first + 5 : first + _PHASES_PER_LAYER], thread, step, x, attended, steps,
            row_of, model, linears, room, layer, sums,
        )  # fmt: skip
    if len(step.logits):
        multiply_some(
            counters[len(counters) - 1], thread, room.narrow_h[: len(x)], room.steps, linears,
            num_layers * LINEARS_PER_LAYER, step.logits, sums,
        )  # fmt: skip
    release(linears.tiles)


@compiled(parallel=True)
def run(num_threads, step, model, linears, room):
    """Fills step.logits, and room.h with the normed states of the rows that go to the head.

    Keys and values of the step's tokens are in the cache then.

    `linears` has LINEARS_PER_LAYER products for each layer, then the head.
    """
    counters = counters_of(3 + len(model.scales) * _PHASES_PER_LAYER, num_threads)
    for index in prange(num_threads):
        thread = np.int64(index)
        _walk(counters, thread, step, model, linears, room)
