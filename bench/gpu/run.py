"""Check and time the CUDA path: one call, random weights, no network.

    python bench/gpu/run.py --out gpu.json

Every part is guarded: one that fails is reported, and the others still run.
"""

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import redmux_bench.checkout  # noqa: F401

# isort: split
import beside
import checks
import front_end
import products
import timings
import torch

from redmux_bench.machine import device_and_versions
from redmux_bench.tables import print_rows
from redmux_server.models.kvcache import LayerShape

Parts = Iterator[tuple[str, Callable[[], Any]]]
_HEADS = (LayerShape(32, 8, 64), LayerShape(32, 8, 128), LayerShape(9, 3, 64))


class Report:
    """Runs parts, keeps what they gave or how they failed, prints both as it goes."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, Any]] = {}

    def part(self, name: str, call: Callable[[], Any]) -> Any:
        """Returns what `call` returned, None if it failed or its library is not there."""
        print(f"\n== {name}", flush=True)
        started_s = time.perf_counter()
        result = None
        try:
            result = call()
            entry = {"status": "ok", "result": result}
        except ModuleNotFoundError as err:
            entry = {"status": "skipped", "error": f"{err.name} is not installed"}
        except Exception as err:
            entry = {"status": "failed", "error": f"{type(err).__name__}: {err}",
                     "traceback": traceback.format_exc()}  # fmt: skip
        entry["seconds"] = round(time.perf_counter() - started_s, 2)
        self.parts[name] = entry
        if entry["status"] == "ok":
            for table in result if isinstance(result, tuple) else (result,):
                if isinstance(table, list):
                    print_rows(table)
                else:
                    print("\n".join(table))
        else:
            print(f"{entry['status']}: {entry.get('traceback', entry['error'])}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return result

    @property
    def failed(self) -> list[str]:
        """Names of the parts that failed."""
        return [name for name, entry in self.parts.items() if entry["status"] == "failed"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write everything as JSON to this file")
    parser.add_argument("--check-only", action="store_true", help="leave the timings out")
    parser.add_argument(
        "--cpu-smoke", action="store_true", help="a tiny model on the CPU: measures nothing"
    )
    parser.add_argument("--shapes", nargs="+", default=["1b", "8b"], choices=["1b", "8b"])
    parser.add_argument("--no-peers", action="store_true", help="leave PEFT and vLLM out")
    parser.add_argument(
        "--served", action="store_true", help="also time the server through gRPC (extra: bench)"
    )
    args = parser.parse_args(argv)
    smoke = args.cpu_smoke
    if not smoke and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --cpu-smoke tries the script on the CPU")
    device = torch.device("cpu" if smoke else "cuda")
    dtype = torch.float32 if smoke else torch.bfloat16
    shapes = ["tiny"] if smoke else args.shapes
    torch.set_num_threads(1)  # nothing of a step is computed on the host
    report = Report()
    packages = ("torch", "transformers", "triton", "peft", "vllm")
    report.part("machine", lambda: [device_and_versions(device.type, *packages)])
    for name, call in parts_of_checks(device, dtype, smoke):
        report.part(name, call)
    if not args.check_only:
        num_bytes = 1 << (20 if smoke else 31)
        copied = report.part("time: bandwidth", lambda: timings.bandwidth(device, num_bytes))
        for name, call in parts_of_timings(shapes, device, dtype, smoke, copied):
            report.part(name, call)
        for name, call in [] if args.no_peers else parts_of_peers(shapes, device, dtype, smoke):
            report.part(name, call)
        if args.served:
            call = partial(front_end.measure, shapes[0], device, dtype, smoke=smoke)
            report.part(f"time: served, {shapes[0]}", call)
    if args.out:
        args.out.write_text(json.dumps(report.parts, indent=1, default=str) + "\n")
    print(f"\n{len(report.parts)} parts, failed: {', '.join(report.failed) or 'none'}")
    return 1 if report.failed else 0


def parts_of_checks(device: torch.device, dtype: torch.dtype, smoke: bool) -> Parts:
    yield "check: edits", partial(checks.edit_kernel, device, smoke)
    if not smoke:
        yield "check: few-row products", partial(products.check, device)
    dtypes = list(dict.fromkeys((dtype, torch.float32)))
    for kind in dtypes:
        for name, make in checks.libraries(device, kind):
            for shape in [LayerShape(4, 2, 16)] if smoke else _HEADS:
                yield (
                    f"check: attention by {name}, {str(kind)[6:]}, {shape.num_heads} heads "
                    f"({shape.num_kv_heads} of keys) of {shape.head_dim}",
                    partial(checks.attention_library, make, shape, device, kind),
                )
    model = "tiny" if smoke else "1b"
    for kind in dtypes:
        yield (
            f"check: graphed decode, {str(kind)[6:]}",
            partial(checks.graphed_decode, model, device, kind),
        )
        yield f"check: tokens, {str(kind)[6:]}", partial(checks.tokens, model, device, kind)


def parts_of_timings(
    shapes: Sequence[str], device: torch.device, dtype: torch.dtype, smoke: bool, copied: Any
) -> Parts:
    if not smoke:
        for name, make in checks.libraries(device, dtype):
            call = partial(timings.attention, make, _HEADS[1], device, dtype)
            yield f"time: attention by {name}", call
        for shape in shapes:
            yield f"time: products, {shape}", partial(products.speeds, shape, device, dtype)
    for shape in shapes if copied else ():
        bytes_per_s = 1e9 * copied[0][timings.COPIED]
        yield (
            f"time: decode, {shape}",
            partial(timings.decode_steps, shape, device, dtype, smoke, bytes_per_s),
        )


def parts_of_peers(
    shapes: Sequence[str], device: torch.device, dtype: torch.dtype, smoke: bool
) -> Parts:
    for shape in shapes:
        yield f"time: PEFT, {shape}", partial(beside.peft_lora, shape, device, dtype, smoke=smoke)
    for shape in [] if smoke else shapes:
        yield f"time: vLLM, {shape}", partial(beside.vllm_base, shape, device, dtype)


if __name__ == "__main__":
    sys.exit(main())
