"""Compile the kernels of a decode step for a Hopper GPU, without one, and print what they take.

    python bench/gpu/compiled.py --shapes 8b --rows 16 32 64

Every kernel of a layer is compiled as it would be launched. Stack bytes mean spilled registers.
"""

import argparse
import contextlib
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # the interpreter has no compiler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import redmux_bench.checkout  # noqa: F401

# isort: split
import numpy as np
import torch
import triton
from rig import SHAPES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from redmux_server.models.cuda import paged_triton, triton_layers, triton_products
from redmux_server.models.cuda.paged_cache import AttentionRule
from redmux_server.models.cuda.paged_step import HostIndex, PagedStep
from redmux_server.models.cuda.triton_tiles import Device
from redmux_server.models.kvcache import LayerShape

Row = dict[str, Any]
H200 = Device(num_multiprocessors=132, shared_bytes=232448, launches_early=True)
_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
          torch.int32: "*i32", torch.int64: "*i64"}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "launch_pdl")


class _Compiled:
    """Stands for a kernel: compiles instead of launching."""

    def __init__(self, kernel: Any, report: Callable[[Row], None]) -> None:
        self._kernel = kernel
        self._report = report

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
            values = dict(zip(self._kernel.arg_names, args, strict=False)) | kwargs
            constants = {p.name: values[p.name] for p in self._kernel.params if p.is_constexpr}
            signature, attributes = {}, {}
            for i, name in enumerate(self._kernel.arg_names):
                signature[name] = "constexpr" if name in constants else _type_of(values[name])
                if signature[name].startswith("*") and name != "rows":
                    attributes[(i,)] = [["tt.divisibility", 16]]
            source = ASTSource(self._kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            self._report({
                "kernel": self._kernel.__name__.strip("_").removesuffix("_kernel"),
                "programs": math.prod(grid), "columns": constants.get("COLUMNS", ""),
                "inner": constants.get("INNER", ""), "stages": options.get("num_stages", ""),
                "shared": compiled.metadata.shared, **_resources(compiled.asm["cubin"]),
            })  # fmt: skip

        return launch


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _resources(cubin: bytes) -> Row:
    """Returns the registers and stack bytes of a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, f"cuobjdump says nothing of registers: {told}"
    return {"registers": int(found[1]), "stack": int(found[2])}


_KERNELS = {
    triton_products: ("_start_kernel", "_project_kernel", "_gate_kernel", "_add_kernel"),
    triton_layers: ("_rotate_kernel",),
    paged_triton: ("_attend", "_join"),
}


@contextlib.contextmanager
def compiling(report: Callable[[Row], None]) -> Iterator[None]:
    """Makes launches inside the block compile and report."""
    plain = [(m, name, getattr(m, name)) for m, names in _KERNELS.items() for name in names]
    for module, name, kernel in plain:
        setattr(module, name, _Compiled(kernel, report))
    try:
        yield
    finally:
        for module, name, kernel in plain:
            setattr(module, name, kernel)


def layer(shape: str, num_rows: int, dtype: torch.dtype, early: bool) -> list[Row]:
    """Compiles the kernels of a layer of this shape with edits where RED has them."""
    options, rows = SHAPES[shape], list[Row]()
    hidden, inner = options["hidden_size"], options["intermediate_size"]
    heads, kv_heads, dim = (
        options[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    few = triton_products.FewRowProducts(hidden, 1e-5, dtype, H200, early=early)
    if num_rows > few.most_rows:
        return []

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def report(row: Row) -> None:
        rows.append(
            {"shape": shape, "rows": num_rows, "dtype": str(dtype)[6:], "early": early, **row}
        )

    norm, owners = empty(hidden), empty(num_rows, dtype=torch.int32)
    table, angles = (empty(9, n, dtype=torch.float32) for n in (4 * hidden, dim))
    longs, blocks = (empty(num_rows, dtype=torch.int64), empty(num_rows, 9, dtype=torch.int32))
    pages = empty(99, 32, kv_heads, dim)
    host = HostIndex.of_decodes(np.zeros(num_rows, int), np.zeros((num_rows, 9), int), 32)
    step = PagedStep(host, longs, owners, owners, blocks, max_count=1, max_keys=288)
    rule = AttentionRule(LayerShape(heads, kv_heads, dim), dim**-0.5, 0, 0.0)
    attention = paged_triton.TritonAttention(H200.num_multiprocessors, early=early)
    with compiling(report):
        residual = few.start(longs, empty(512, hidden), norm)
        qkv = few.project(residual, empty((heads + 2 * kv_heads) * dim, hidden), None)
        query = triton_layers.rotate(
            qkv, pages, pages, longs, longs, angles, angles, None, table, owners, (-1, -1, -1),
            early=early,
        )  # fmt: skip
        mixed = attention(step, rule, query, pages, pages).flatten(1)
        out = empty(hidden, heads * dim)
        few.add(residual, mixed, out, None, norm, table, owners, -1)
        gated = few.gate(residual, empty(2 * inner, hidden), None, table, owners, -1, -1)
        few.add(residual, gated, empty(hidden, inner), None, norm, table, owners, 0)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=["1b", "8b"], choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"]
    )
    args = parser.parse_args(argv)
    spilled = 0
    for shape in args.shapes:
        for dtype in args.dtypes:
            for num_rows in args.rows:
                for early in (False, True):
                    for i, row in enumerate(layer(shape, num_rows, getattr(torch, dtype), early)):
                        if i == 0:
                            print("  ".join(f"{key:>9}" for key in row))
                        print("  ".join(f"{value!s:>9}" for value in row.values()), flush=True)
                        spilled += row["stack"] > 0
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
