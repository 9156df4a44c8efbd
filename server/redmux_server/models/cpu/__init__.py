"""CPUs: packed products, row kernels and paged attention, compiled by numba."""
