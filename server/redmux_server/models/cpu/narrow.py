"""Activations as matrix products take them: fp32 as it is, or a row rounded on its own.

Which it is follows from the type of the array that the result goes to; see `vector.product`.
"""

import numpy as np
from numba import types
from numba.extending import overload

from redmux_server.models.cpu.block_kernel import BLOCK
from redmux_server.models.cpu.compiled import compiled

LEVELS = 127  # steps of an 8-bit value to either side of zero
PART = 64  # inputs that share a step: an outlier spoils no others; multiple of every group
OFFSET = 128  # of an activation where products take it unsigned
SMALLEST_STEP = np.float32(1e-30)  # far below what any sum can show; keeps zeros from 0 / 0


@compiled
def _step_of(x):
    """Returns LEVELS-th part of the largest magnitude in x; NaN or infinite if an element is."""
    # Without its sign bit a number orders as an integer, and integers have a fast maximum.
    bits = x.view(np.int32)
    highest = np.int32(0)
    for d in range(x.size):
        highest = max(highest, bits[d] & np.int32(0x7FFFFFFF))
    step = np.int32(highest).view(np.float32) / np.float32(LEVELS)
    return SMALLEST_STEP if step < SMALLEST_STEP else step


@compiled
def _to_whole(x, out, steps, offset):
    for p in range(-(-x.size // PART)):
        part, target = x[p * PART : (p + 1) * PART], out[p * PART : (p + 1) * PART]
        steps[p] = _step_of(part)
        inverse = np.float32(1.0) / steps[p]
        for d in range(part.size):
            target[d] = np.int32(np.rint(part[d] * inverse)) + offset


@compiled
def _to_blocks(x, out, steps):
    # All of `out`: a step behind x that another row has left might be no number.
    for b in range(out.size // BLOCK):
        part, target = x[b * BLOCK : (b + 1) * BLOCK], out[b * BLOCK : (b + 1) * BLOCK]
        step = _step_of(part)
        inverse, total = np.float32(1.0) / step, np.int32(0)
        for d in range(part.size):
            whole = np.int32(np.rint(part[d] * inverse))
            target[d] = whole
            total += whole
        steps[2 * b], steps[2 * b + 1] = step, step * np.float32(total)


@compiled
def _bf16_bits(u):
    """Returns the bits of the bf16 that is nearest to the fp32 of these bits."""
    even = u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))
    is_nan = (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(0x7FC0) if is_nan else np.uint16(even >> np.uint32(16))


@compiled
def _to_bf16(x, out, steps):
    bits = x.view(np.uint32)
    for d in range(x.size):
        out[d] = _bf16_bits(bits[d])


def narrow_row(x, out, steps):
    """Writes x [dim], fp32, into out [dim or more], rounded to its type.

    `steps` gets the step of every PART values where they are multiples of one; for int8 that of
    every BLOCK values, each with the sum of the rounded values behind it.
    fp32 is not written: it is x itself.
    """
    raise NotImplementedError("this is for compiled code")


@overload(narrow_row)
def _narrow_row(x, out, steps):
    if out.dtype is types.uint8:
        return lambda x, out, steps: _to_whole(x, out, steps, np.int32(OFFSET))
    if out.dtype is types.int8:
        return lambda x, out, steps: _to_blocks(x, out, steps)
    if out.dtype is types.int16:
        return lambda x, out, steps: _to_whole(x, out, steps, np.int32(0))
    if out.dtype is types.uint16:
        return lambda x, out, steps: _to_bf16(x, out, steps)
    return lambda x, out, steps: None


def is_narrowed(out):
    """Whether products take something else than the fp32 values themselves."""
    raise NotImplementedError("this is for compiled code")


@overload(is_narrowed)
def _is_narrowed(out):
    if out.dtype is types.float32:
        return lambda out: False
    return lambda out: True


def kept(value, array):
    """Returns an fp32 value as an array of fp32, or of the bits of bf16, keeps it."""
    raise NotImplementedError("this is for compiled code")


@overload(kept)
def _kept(value, array):
    if array.dtype == types.float32:
        return lambda value, array: value
    return lambda value, array: _bf16_bits(np.float32(value).view(np.uint32))
