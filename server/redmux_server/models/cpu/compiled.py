"""How the CPU's kernels are compiled."""

from functools import partial

from numba import njit

# Contraction to fused multiply-add is the same in every lane; nothing may be reordered. A loop
# that may raise ZeroDivisionError is not vectorised, so division follows IEEE 754.
compiled = partial(njit, fastmath={"contract", "nsz"}, nogil=True, cache=True, error_model="numpy")
