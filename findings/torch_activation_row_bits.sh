#!/usr/bin/env bash
# A row's SiLU (sigmoid, tanh-GELU, softplus) in fp32 on a CPU depends on how many rows stand beside
# it, in the last bits: torch cuts the whole tensor, not each row, into one piece a thread and whole
# vectors, and computes what is left over at the end of a piece by scalar code with other rounding.
# So elementwise is not row by row: whoever promises a request the same bits alone and in a batch
# gets them only where the width of a row is a multiple of the vectors' step and one thread computes
# it. GELU by erf, tanh and exp have no such difference.
#
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

UNEVEN = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu (tanh)": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
}
EVEN = {"gelu (erf)": F.gelu, "tanh": torch.tanh, "exp": torch.exp}
LEVEL = torch.backends.cpu.get_cpu_capability()
print("torch", torch.__version__, "vectors:", LEVEL)
if LEVEL not in ("AVX2", "AVX512"):
    print("skipped: this CPU has neither AVX2 nor AVX-512")
    sys.exit(0)


def differing_rows(function, width):
    """Rows of 64 that get other bits in a smaller batch of the same rows, over several sizes."""
    rows = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    whole = function(rows)
    found = 0
    for size in (1, 2, 3, 5, 7, 11, 24, 33, 48):
        part = function(rows[:size])
        found += sum(not torch.equal(part[i], whole[i]) for i in range(size))
    return found


table = {}
for threads, width in ((1, 4096), (1, 1530), (3, 4096), (3, 1530)):
    torch.set_num_threads(threads)
    for name, function in (UNEVEN | EVEN).items():
        table[name, threads, width] = differing_rows(function, width)
        print(f"{name:12} {threads} threads, width {width}: {table[name, threads, width]} rows differ")
as_described = (
    all(table[name, 1, 4096] == 0 for name in UNEVEN | EVEN)
    and all(table[name, threads, 1530] > 0 for name in UNEVEN for threads in (1, 3))
    and any(table[name, 3, 4096] > 0 for name in UNEVEN)
    and all(count == 0 for (name, _, _), count in table.items() if name in EVEN)
)
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
PYTHON
# Output seen (AVX-512, torch 2.13.0+cpu):
# torch 2.13.0+cpu vectors: AVX512
# silu         1 threads, width 4096: 0 rows differ
# sigmoid      1 threads, width 4096: 0 rows differ
# gelu (tanh)  1 threads, width 4096: 0 rows differ
# softplus     1 threads, width 4096: 0 rows differ
# gelu (erf)   1 threads, width 4096: 0 rows differ
# tanh         1 threads, width 4096: 0 rows differ
# exp          1 threads, width 4096: 0 rows differ
# silu         1 threads, width 1530: 3 rows differ
# sigmoid      1 threads, width 1530: 3 rows differ
# gelu (tanh)  1 threads, width 1530: 8 rows differ
# softplus     1 threads, width 1530: 7 rows differ
# gelu (erf)   1 threads, width 1530: 0 rows differ
# tanh         1 threads, width 1530: 0 rows differ
# exp          1 threads, width 1530: 0 rows differ
# silu         3 threads, width 4096: 3 rows differ
# sigmoid      3 threads, width 4096: 3 rows differ
# gelu (tanh)  3 threads, width 4096: 13 rows differ
# softplus     3 threads, width 4096: 4 rows differ
# gelu (erf)   3 threads, width 4096: 0 rows differ
# tanh         3 threads, width 4096: 0 rows differ
# exp          3 threads, width 4096: 0 rows differ
# silu         3 threads, width 1530: 6 rows differ
# sigmoid      3 threads, width 1530: 6 rows differ
# gelu (tanh)  3 threads, width 1530: 14 rows differ
# softplus     3 threads, width 1530: 9 rows differ
# gelu (erf)   3 threads, width 1530: 0 rows differ
# tanh         3 threads, width 1530: 0 rows differ
# exp          3 threads, width 1530: 0 rows differ
# as described
