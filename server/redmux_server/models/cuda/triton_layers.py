"""What lies between the matrix products of a Llama-like layer, as Triton kernels.

The edits of a site happen in the kernel that reads its output anyway. All arithmetic is fp32; a
value is rounded to the model's dtype once, where it is stored.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from redmux_server.models.cuda.triton_early import follow, launch_options, lead

_COLUMNS = 1024  # of one program of the gate


@triton.jit
def _edited(h, table, row, start, column, dim, inside):
    """h * scale + bias by a row of the bank; row 0 is the identity and reads nothing."""
    if row != 0:
        scale = tl.load(table + row + start + column, mask=inside, other=1).to(tl.float32)
        bias = tl.load(table + row + start + dim + column, mask=inside, other=0).to(tl.float32)
        h = h * scale + bias
    return h


@triton.jit
def _add_norm_kernel(
    x, y, table, rows, weight, out, start, table_stride, dim, eps,
    ADDS: tl.constexpr, EDITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    h = tl.load(x + token * dim + column, mask=inside, other=0).to(tl.float32)
    if ADDS:
        added = tl.load(y + token * dim + column, mask=inside, other=0).to(tl.float32)
        if EDITS:
            row = tl.load(rows + token).to(tl.int64) * table_stride
            added = _edited(added, table, row, start, column, dim, inside)
        h = (h + added).to(x.dtype.element_ty)
        tl.store(x + token * dim + column, h, mask=inside)
        h = h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, 0) / dim + eps)
    w = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + token * dim + column, (h * scale * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_kernel(
    gate_up, out, table, rows, gate_start, up_start, table_stride, dim,
    EDITS_GATE: tl.constexpr, EDITS_UP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    gate = tl.load(gate_up + token * 2 * dim + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + (token * 2 + 1) * dim + column, mask=inside, other=0).to(tl.float32)
    if EDITS_GATE or EDITS_UP:
        row = tl.load(rows + token).to(tl.int64) * table_stride
        if EDITS_GATE:
            gate = _edited(gate, table, row, gate_start, column, dim, inside)
        if EDITS_UP:
            up = _edited(up, table, row, up_start, column, dim, inside)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + token * dim + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _halves(line, head, half, HALF: tl.constexpr, num_heads):
    """Both halves of some heads, [heads, HALF] each in fp32, their places and what is inside."""
    d = tl.arange(0, HALF)
    place = line + head[:, None] * (2 * half) + d[None, :]
    inside = (head < num_heads)[:, None] & (d < half)[None, :]
    low = tl.load(place, mask=inside, other=0).to(tl.float32)
    high = tl.load(place + half, mask=inside, other=0).to(tl.float32)
    return low, high


@triton.jit
def _edited_heads(low, high, table, row, start, head, half, num_heads, HALF: tl.constexpr):
    d = tl.arange(0, HALF)
    column = head[:, None] * (2 * half) + d[None, :]
    inside = (head < num_heads)[:, None] & (d < half)[None, :]
    dim = num_heads * 2 * half
    low = _edited(low, table, row, start, column, dim, inside)
    high = _edited(high, table, row, start, column + half, dim, inside)
    return low, high


@triton.jit
def _normed_heads(low, high, weight, half, eps, HALF: tl.constexpr):
    d = tl.arange(0, HALF)
    mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * half)
    scale = tl.rsqrt(mean + eps)[:, None]
    low_weight = tl.load(weight + d, mask=d < half, other=0).to(tl.float32)
    high_weight = tl.load(weight + half + d, mask=d < half, other=0).to(tl.float32)
    return low * scale * low_weight[None, :], high * scale * high_weight[None, :]


@triton.jit
def _store_heads(target, low, high, head, half, first_head, num_heads, HALF: tl.constexpr):
    d = tl.arange(0, HALF)
    inside = ((head >= first_head) & (head < num_heads))[:, None] & (d < half)[None, :]
    place = target + (head - first_head)[:, None] * (2 * half) + d[None, :]
    tl.store(place, low.to(target.dtype.element_ty), mask=inside)
    tl.store(place + half, high.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_kernel(
    qkv, query, keys, values, slots, positions, cos, sin, q_norm, k_norm,
    table, rows, q_start, k_start, v_start, table_stride,
    num_heads, num_kv_heads, half, eps,
    GROUP: tl.constexpr, HALF: tl.constexpr, HAS_NORM: tl.constexpr,
    EDITS_Q: tl.constexpr, EDITS_K: tl.constexpr, EDITS_V: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The heads of one KV head and one token: edit, norm and rotate; the key and value go home."""
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    follow(EARLY)
    lead(EARLY)
    dim = 2 * half
    line = qkv + token * ((num_heads + 2 * num_kv_heads) * dim)
    k_line, v_line = line + num_heads * dim, line + (num_heads + num_kv_heads) * dim
    group = num_heads // num_kv_heads
    head = kv_head * group + tl.arange(0, GROUP)
    last_head = (kv_head + 1) * group
    own = kv_head + tl.arange(0, 1)
    q_low, q_high = _halves(line, head, half, HALF, last_head)
    k_low, k_high = _halves(k_line, own, half, HALF, num_kv_heads)
    v_low, v_high = _halves(v_line, own, half, HALF, num_kv_heads)
    if EDITS_Q or EDITS_K or EDITS_V:
        row = tl.load(rows + token).to(tl.int64) * table_stride
        if EDITS_Q:
            q_low, q_high = _edited_heads(
                q_low, q_high, table, row, q_start, head, half, num_heads, HALF
            )
        if EDITS_K:
            k_low, k_high = _edited_heads(
                k_low, k_high, table, row, k_start, own, half, num_kv_heads, HALF
            )
        if EDITS_V:
            v_low, v_high = _edited_heads(
                v_low, v_high, table, row, v_start, own, half, num_kv_heads, HALF
            )
    if HAS_NORM:
        q_low, q_high = _normed_heads(q_low, q_high, q_norm, half, eps, HALF)
        k_low, k_high = _normed_heads(k_low, k_high, k_norm, half, eps, HALF)
    d = tl.arange(0, HALF)
    angle = tl.load(positions + token).to(tl.int64) * dim + d
    c_low = tl.load(cos + angle, mask=d < half, other=0)[None, :]
    c_high = tl.load(cos + angle + half, mask=d < half, other=0)[None, :]
    s_low = tl.load(sin + angle, mask=d < half, other=0)[None, :]
    s_high = tl.load(sin + angle + half, mask=d < half, other=0)[None, :]
    q_out = query + token * (num_heads * dim) + kv_head * group * dim
    _store_heads(q_out, q_low * c_low - q_high * s_low, q_high * c_high + q_low * s_high,
                 head, half, kv_head * group, last_head, HALF)  # fmt: skip
    home = tl.load(slots + token).to(tl.int64) * (num_kv_heads * dim)
    _store_heads(keys + home, k_low * c_low - k_high * s_low, k_high * c_high + k_low * s_high,
                 own, half, 0, num_kv_heads, HALF)  # fmt: skip
    _store_heads(values + home, v_low, v_high, own, half, 0, num_kv_heads, HALF)


def add_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, table: Tensor, rows: Tensor,
    start: int,
) -> Tensor:  # fmt: skip
    """Adds the edited y to the residual x [tokens, dim] in place and returns x's RMS norm.

    Without y it is the norm alone. `start` is the site's first column in `table` [bank rows,
    width], -1 for a site that nobody edits; `rows` is int32 [tokens].
    """
    out = x.new_empty(x.shape)
    dim = x.shape[1]
    block = triton.next_power_of_2(dim)
    _add_norm_kernel[(len(x),)](
        x, x if y is None else y, table, rows, weight, out, start, table.stride(0), dim, eps,
        ADDS=y is not None, EDITS=start >= 0, BLOCK=block,
        num_warps=max(1, min(16, block // 256)),
    )  # fmt: skip
    return out


def gate(gate_up: Tensor, table: Tensor, rows: Tensor, gate_start: int, up_start: int) -> Tensor:
    """Returns silu(gate) * up [tokens, dim] of gate_up [tokens, 2 * dim]; starts as in add_norm."""
    tokens, dim = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((tokens, dim))
    block = min(_COLUMNS, triton.next_power_of_2(dim))
    _gate_kernel[(tokens, triton.cdiv(dim, block))](
        gate_up, out, table, rows, gate_start, up_start, table.stride(0), dim,
        EDITS_GATE=gate_start >= 0, EDITS_UP=up_start >= 0, BLOCK=block,
    )  # fmt: skip
    return out


def rotate(
    qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, cos: Tensor,
    sin: Tensor, norms: tuple[Tensor, Tensor, float] | None, table: Tensor, rows: Tensor,
    starts: Sequence[int], *, early: bool = False,
) -> Tensor:  # fmt: skip
    """Returns the queries [tokens, heads, head_dim], and stores keys and values in their slots.

    qkv is [tokens, (heads + 2 * kv_heads) * head_dim]; keys and values are pages [blocks,
    block_size, kv_heads, head_dim]; slots and positions int64 [tokens]; cos and sin fp32
    [positions, head_dim]; `norms` the weights for the heads of q and k and their epsilon, where a
    model has them; `starts` those of q, k and v as in add_norm. With `early` it is launched while
    the kernel before it still runs.
    """
    num_kv_heads, head_dim = keys.shape[2], keys.shape[3]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    out = qkv.new_empty((len(qkv), num_heads, head_dim))
    q_norm, k_norm, eps = norms or (cos, cos, 0.0)
    _rotate_kernel[(len(qkv), num_kv_heads)](
        qkv, out, keys, values, slots, positions, cos, sin, q_norm, k_norm,
        table, rows, *starts, table.stride(0), num_heads, num_kv_heads, head_dim // 2, eps,
        GROUP=triton.next_power_of_2(num_heads // num_kv_heads),
        HALF=triton.next_power_of_2(head_dim // 2), HAS_NORM=norms is not None,
        EDITS_Q=starts[0] >= 0, EDITS_K=starts[1] >= 0, EDITS_V=starts[2] >= 0, num_warps=1,
        **launch_options(early),
    )  # fmt: skip
    return out
