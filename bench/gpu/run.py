"""Check and time the CUDA path: one call, random weights, no network.

    python bench/gpu/run.py --out gpu.json

Every part is guarded: one that fails is reported, and the others still run.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("redmux") is None:  # run from a checkout that is not installed
    sys.path[:0] = [str(_ROOT / folder) for folder in ("client", "adapters", "server")]

import beside  # noqa: E402
import checks  # noqa: E402
import products  # noqa: E402
import served  # noqa: E402
import timings  # noqa: E402
import torch  # noqa: E402

from redmux_server.models.kvcache import LayerShape  # noqa: E402

Row = dict[str, Any]
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
                print_table(table)
        else:
            print(f"{entry['status']}: {entry['error']}")
            if "traceback" in entry:
                print(entry["traceback"].rstrip())
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return result

    @property
    def failed(self) -> list[str]:
        """Names of the parts that failed."""
        return [name for name, entry in self.parts.items() if entry["status"] == "failed"]


def print_table(rows: Any) -> None:
    if not isinstance(rows, list):
        print("\n".join(map(str, rows)) if isinstance(rows, tuple) else rows)
        return
    for i, row in enumerate(rows):
        if i == 0 or rows[i - 1].keys() != row.keys():
            print("  ".join(f"{key:>16}" for key in row))
        print("  ".join(f"{value!s:>16}" for value in row.values()), flush=True)


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
    if not args.cpu_smoke and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --cpu-smoke tries the script on the CPU")
    device = torch.device("cpu" if args.cpu_smoke else "cuda")
    torch.set_num_threads(1)  # nothing of a step is computed on the host
    report = Report()
    report.part("machine", lambda: [machine(device)])
    run_checks(report, device, args.cpu_smoke)
    if not args.check_only:
        shapes = ["tiny"] if args.cpu_smoke else args.shapes
        run_timings(report, device, shapes, args.cpu_smoke)
        if not args.no_peers:
            run_peers(report, device, shapes, args.cpu_smoke)
        if args.served:
            run_served(report, device, shapes[0], args.cpu_smoke)
    if args.out:
        args.out.write_text(json.dumps(report.parts, indent=1, default=str) + "\n")
    print(f"\n{len(report.parts)} parts, failed: {', '.join(report.failed) or 'none'}")
    return 1 if report.failed else 0


def machine(device: torch.device) -> Row:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    row: Row = {"device": name or "cpu", "python": platform.python_version()}
    for package in ("torch", "transformers", "triton", "peft", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            row[package] = importlib.metadata.version(package)
    return row


def run_checks(report: Report, device: torch.device, smoke: bool) -> None:
    half = torch.float32 if smoke else torch.bfloat16
    heads = [LayerShape(4, 2, 16)] if smoke else _HEADS
    report.part("check: edits", lambda: checks.edit_kernel(device, smoke))
    if not smoke:
        report.part("check: few-row products", lambda: products.check(device))
    for dtype in dict.fromkeys((half, torch.float32)):
        for name, make in checks.libraries(device, dtype):
            for shape in heads:
                report.part(
                    f"check: attention by {name}, {str(dtype)[6:]}, {shape.num_heads} heads "
                    f"({shape.num_kv_heads} of keys) of {shape.head_dim}",
                    lambda make=make, shape=shape, dtype=dtype: checks.attention_library(
                        make, shape, device, dtype
                    ),
                )
    model = "tiny" if smoke else "1b"
    for dtype in dict.fromkeys((half, torch.float32)):
        report.part(
            f"check: graphed decode, {str(dtype)[6:]}",
            lambda dtype=dtype: checks.graphed_decode(model, device, dtype),
        )
        report.part(
            f"check: tokens, {str(dtype)[6:]}",
            lambda dtype=dtype: checks.tokens(model, device, dtype),
        )


def run_timings(report: Report, device: torch.device, shapes: Sequence[str], smoke: bool) -> None:
    dtype = torch.float32 if smoke else torch.bfloat16
    size = 1 << (20 if smoke else 31)
    bytes_per_s: float | None = None

    def measure() -> list[Row]:
        nonlocal bytes_per_s
        bytes_per_s = timings.bandwidth(device, size)
        return [{"copy GB/s, read + write": round(bytes_per_s / 1e9, 1)}]

    report.part("time: bandwidth", measure)
    for name, make in [] if smoke else checks.libraries(device, dtype):
        report.part(
            f"time: attention by {name}",
            lambda make=make: timings.attention(make, _HEADS[1], device, dtype),
        )
    for shape in [] if smoke else shapes:
        report.part(
            f"time: products, {shape}", lambda shape=shape: products.speeds(shape, device, dtype)
        )
    for shape in shapes:
        if bytes_per_s is not None:
            report.part(
                f"time: decode, {shape}",
                lambda shape=shape: timings.decode_steps(
                    shape, device, dtype, smoke=smoke, bytes_per_s=bytes_per_s
                ),
            )


def run_peers(report: Report, device: torch.device, shapes: Sequence[str], smoke: bool) -> None:
    dtype = torch.float32 if smoke else torch.bfloat16
    for shape in shapes:
        report.part(
            f"time: PEFT, {shape}",
            lambda shape=shape: beside.peft_lora(shape, device, dtype, smoke=smoke),
        )
    for shape in [] if smoke else shapes:
        report.part(
            f"time: vLLM, {shape}",
            lambda shape=shape: beside.vllm_base(shape, device, dtype),
        )


def run_served(report: Report, device: torch.device, shape: str, smoke: bool) -> None:
    dtype = torch.float32 if smoke else torch.bfloat16
    report.part(
        f"time: served, {shape}", lambda: served.front_end(shape, device, dtype, smoke=smoke)
    )


if __name__ == "__main__":
    sys.exit(main())
