"""Work that threads share: items are claimed one by one, and a phase is over when all are done.

A thread waits for items, never for other threads: one that the system holds back, or never
starts, delays nothing but what it has claimed itself, and one thread alone gets through.

Threads are numbered in int64: prange's own numbers are signed where it is typed and unsigned where
it runs, so that all that gets one would be compiled twice.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from redmux_server.models.cpu.compiled import compiled

_APART = 16  # counters lie on cache lines of their own
_SPINS = 4096  # looks at a counter before the core is offered to others
_INT64 = ir.IntType(64)


def _address(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    data = context.make_array(sig.args[0])(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@intrinsic
def _fetch_add(typing, counters, index, count):
    """Returns counters[index] of an int64 array and adds `count` to it, as one step."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig, args)
        return builder.atomic_rmw("add", address, args[2], "acq_rel")

    return types.int64(counters, types.int64, types.int64), codegen


@intrinsic
def _load(typing, counters, index):
    """Returns counters[index] as other threads have left it, with all that they wrote before."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_address(context, builder, sig, args), "acquire", 8)

    return types.int64(counters, types.int64), codegen


@intrinsic
def _yield_core(typing):
    """Lets another thread of this machine run on this core, if one waits for it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.IntType(32), []), "sched_yield"
        )
        return builder.call(function, [])

    return types.int32(), codegen


@compiled
def counters_of(num_phases, num_threads):
    """Returns the state of `num_phases` passes of this many threads; row i is that of pass i."""
    return np.zeros((num_phases, (num_threads + 1) * _APART), np.int64)


@compiled
def num_threads_of(counters):
    """Returns for how many threads the counters of a pass are."""
    return counters.size // _APART - 1


@compiled
def claim(counters, thread, num_items):
    """Returns an item from 0 to num_items that no thread has got yet, or num_items for none left.

    Each thread walks an equal share, which is read as one stream, and then helps the others: all
    end together even where another process holds one of their cores for a while.
    """
    num_threads = num_threads_of(counters)
    for k in range(num_threads):
        share = (thread + k) % num_threads
        first, stop = num_items * share // num_threads, num_items * (share + 1) // num_threads
        if first + counters[share * _APART] < stop:
            item = first + _fetch_add(counters, share * _APART, 1)
            if item < stop:
                return item
    return num_items


@compiled
def finish(counters, num_done, num_items):
    """Counts `num_done` items of this thread as done, and waits until all `num_items` are."""
    done = counters.size - _APART
    if num_done > 0 and _fetch_add(counters, done, num_done) + num_done == num_items:
        return
    spins = 0
    while _load(counters, done) < num_items:
        spins += 1
        if spins % _SPINS == 0:
            _yield_core()
