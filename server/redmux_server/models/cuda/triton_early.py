"""Kernels that are launched while the one before still runs: programmatic dependent launch.

A kernel launched so (`launch_pdl`) may begin once every program of the kernel before it has called
`lead` or ended. Until it calls `follow`, which every program must, it may read only what no kernel
of the step writes. Hopper and later; without EARLY both do nothing.
"""

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    CAN_LAUNCH_EARLY = True
except ImportError:  # before Triton 3.4
    CAN_LAUNCH_EARLY = False

    @triton.jit
    def gdc_wait():
        """Never called."""

    @triton.jit
    def gdc_launch_dependents():
        """Never called."""


@triton.jit
def follow(EARLY: tl.constexpr):
    """From here on everything before this kernel has ended."""
    if EARLY:
        gdc_wait()


@triton.jit
def lead(EARLY: tl.constexpr):
    """From here on the next kernel may be launched."""
    if EARLY:
        gdc_launch_dependents()


def launch_options(early: bool) -> dict[str, bool]:
    """Returns what a kernel that calls `follow` is launched with."""
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
