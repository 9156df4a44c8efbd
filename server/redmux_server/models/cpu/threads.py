"""How many threads compute, which is a property of the calling thread."""

import numba
import torch


def set_threads(num_threads: int, computes_in_torch: bool) -> None:
    """Lets kernels use so many threads, and torch as many or one.

    Where torch has nothing large to do, threads of its own would only wait for work, busily, on the
    cores that the kernels' threads need, and cost a row its bits; see `computes_in_torch`.
    """
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
    # After numba's, whose first call in a process sets OpenMP's number back to all cores.
    torch.set_num_threads(num_threads if computes_in_torch else 1)
