"""What a loaded server gives back to the system."""

import ctypes
import sys

import numpy as np
import pytest

from redmux_server.models.settle import _unchanged, settle

SMAPS = """\
1000-3000 r-xp 00000000 08:01 12    /usr/lib/libone.so.6
Rss:                   8 kB
Anonymous:             0 kB
3000-4000 r--p 00002000 08:01 12    /usr/lib/libone.so.6
Anonymous:             4 kB
4000-5000 rw-p 00003000 08:01 12    /usr/lib/libone.so.6
Anonymous:             0 kB
5000-9000 r--p 00000000 08:01 13    /a folder/two.cpython-311.so
Anonymous:             0 kB
9000-a000 r-xp 00000000 00:00 0
Anonymous:             0 kB
a000-b000 r--p 00000000 08:01 14    /models/model.safetensors
Anonymous:             0 kB
"""


def test_only_unwritten_parts_of_libraries_are_let_go_of():
    assert list(_unchanged(SMAPS)) == [(0x1000, 0x2000), (0x5000, 0x4000)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")
def test_libraries_compute_as_before_when_their_pages_have_gone():
    square = np.arange(9.0).reshape(3, 3)
    before = np.linalg.eigvals(square)
    settle()
    assert np.array_equal(np.linalg.eigvals(square), before)
    assert ctypes.CDLL(None).abs(-3) == 3
