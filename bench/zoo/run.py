"""Trains and scores the zoo on one GPU: RED, RED++, parts of RED, PEFT's LoRA and the bare base.

    python bench/zoo/run.py --base model.gguf --data .gpu/zoo-data --out results --deadline 330

Every part is a process; one that fails is reported, and the others still run. What there is so far
is in the output folder at any time.
"""

import argparse
import contextlib
import faulthandler
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_STARTED = time.time()
_HERE = Path(__file__).resolve()
if importlib.util.find_spec("redmux") is None:  # run from a checkout that is not installed
    sys.path[:0] = [str(_HERE.parents[2] / folder) for folder in ("client", "adapters", "server")]

import torch  # noqa: E402
from collect import collect  # noqa: E402
from part_base import base  # noqa: E402
from part_lora import lora  # noqa: E402
from part_red import ablations, more, red  # noqa: E402
from plan import PLAIN_NAME, Part, Plan  # noqa: E402
from restyle import plain_answers, style_questions  # noqa: E402
from tasks import TASKS  # noqa: E402

from redmux_adapters.bases.load import resolve  # noqa: E402

# In the order of their importance. All but the first two wait until RED is trained.
PARTS: dict[str, Callable[[Plan, Part], None]] = {
    "red": red,
    "base": base,
    "more": lambda plan, part: more(plan, part, 1.0),
    "lora8": lambda plan, part: lora(plan, part, 8, 1e-3),
    "lora16": lambda plan, part: lora(plan, part, 16, 1e-3),
    "ablations": ablations,
    "lora8-high": lambda plan, part: lora(plan, part, 8, 3e-3),
    "lora16-high": lambda plan, part: lora(plan, part, 16, 3e-3),
    "more-low": lambda plan, part: more(plan, part, 0.5),
}
FIRST = ("red", "base")
_LEAST_S = 60.0  # before the deadline a part has to start
_WRITE_S = 4.0  # for the last files
_POLL_S = 0.5
_COLLECT_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.part:
        return run_part(args.part, args.work)
    if args.smoke:
        set_smoke(args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="zoo-") as work:
        folder = tiny_model(resolve(args.base), work) if args.smoke else resolve(args.base)
        print(f"{time.time() - _STARTED:6.1f} s  model in {folder}", flush=True)
        plan = Plan(
            base=folder,
            data=str(args.data),
            work=work,
            device=device,
            dtype=args.dtype or ("bfloat16" if device == "cuda" else "float32"),
            tasks=tuple(args.tasks),
            steps=max(4, round(args.steps * args.steps_scale)),
            batch_size=args.batch_size,
            num_train=args.num_train,
            num_valid=args.num_valid,
            num_test=args.num_test,
            max_new_tokens=args.max_new_tokens,
            max_pass_tokens=args.max_pass_tokens,
            red_s=args.red_share * args.deadline,
            deadline=_STARTED + args.deadline - _WRITE_S,
        )
        plan.save()
        plain = style_questions(args.data, plan.tasks)
        if not args.smoke:
            plain = plain_answers(folder, list(plain), device)
        (Path(work) / PLAIN_NAME).write_text(json.dumps(plain), encoding="utf-8")
        if device == "cuda":
            torch.cuda.empty_cache()
        print(f"{time.time() - _STARTED:6.1f} s  plain answers written", flush=True)
        states = run_here(plan, args) if args.in_process else drive(plan, args)
        for name, state in states.items():
            print(f"{name:12} {state}")
    failed = [name for name, state in states.items() if state["status"] != "ok"]
    print(f"{time.time() - _STARTED:.1f} s, not ok: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default="smollm2", help="folder, .gguf file or smollm2")
    parser.add_argument("--data", type=Path, help="folder that prepare.py has filled")
    parser.add_argument("--out", type=Path, help="folder for what is found")
    parser.add_argument("--deadline", type=float, default=330, help="seconds for everything")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--steps-scale", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-train", type=int, default=6500)
    parser.add_argument("--num-valid", type=int, default=96)
    parser.add_argument("--num-test", type=int, default=250)
    parser.add_argument("--max-new-tokens", type=int, default=128, help="bound on all answers")
    parser.add_argument("--max-pass-tokens", type=int, default=12288)
    parser.add_argument("--red-share", type=float, default=0.25, help="of the deadline, for RED")
    parser.add_argument("--parallel", type=int, default=4, help="processes at once")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--dtype", help="of the base in training; bfloat16 on a GPU, else float32")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, few examples")
    parser.add_argument("--in-process", action="store_true", help="one part after another, here")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.part and (args.data is None or args.out is None):
        parser.error("--data and --out are needed")
    return args


def set_smoke(args: argparse.Namespace) -> None:
    """Makes everything small, so that every part is tried and nothing is measured."""
    args.steps, args.batch_size, args.num_train, args.num_valid, args.num_test = 4, 2, 40, 2, 2
    args.max_new_tokens, args.max_pass_tokens = 4, 2048


def tiny_model(folder: str, work: str) -> str:
    """Returns a folder with a random model of two layers and the tokenizer of a real one."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    config.update({
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": None,
    })  # fmt: skip
    torch.manual_seed(0)
    target = str(Path(work) / "tiny")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


def drive(plan: Plan, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Runs the parts as processes and collects their results; returns how each ended."""
    work, queue = Path(plan.work), list(args.parts)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    states: dict[str, dict[str, Any]] = {}
    head = {"plan": plan.__dict__, "machine": machine(plan.device), "command": sys.argv}
    last_collected = 0.0
    while (queue or running) and plan.remaining_s() > 0:
        for name, (process, started) in list(running.items()):
            if process.poll() is not None:
                states[name] = ended(work, name, process.returncode, time.time() - started)
                print(f"{time.time() - _STARTED:6.1f} s  {name}: {states[name]}", flush=True)
                del running[name]
        red_is_trained = (work / "part-red.trained").exists() or "red" in states
        while queue and len(running) < args.parallel:
            if queue[0] not in FIRST and "red" in args.parts and not red_is_trained:
                break
            name = queue.pop(0)
            if plan.remaining_s() < _LEAST_S and not args.smoke:
                states[name] = {"status": "not started", "error": "too little time was left"}
                continue
            print(f"{time.time() - _STARTED:6.1f} s  {name} starts", flush=True)
            running[name] = start(work, name), time.time()
        if time.time() - last_collected > _COLLECT_S:
            gather(plan, args.out, head, states)
            last_collected = time.time()
        time.sleep(_POLL_S)
    for name, (process, started) in running.items():
        process.kill()
        process.wait()
        states[name] = ended(work, name, None, time.time() - started)
    for name in queue:
        states[name] = {"status": "not started", "error": "the time was over"}
    gather(plan, args.out, head, states)
    return states


def run_here(plan: Plan, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Runs the parts in this process, one after another, for trials."""
    states: dict[str, dict[str, Any]] = {}
    head = {"plan": plan.__dict__, "machine": machine(plan.device), "command": sys.argv}
    for name in args.parts:
        began = time.time()
        try:
            run_part(name, plan.work)
            states[name] = {"status": "ok"}
        except Exception:
            states[name] = {"status": "failed", "error": traceback.format_exc()}
            print(states[name]["error"])
        states[name]["seconds"] = round(time.time() - began, 1)
        print(f"{time.time() - _STARTED:6.1f} s  {name}: {states[name]['status']}", flush=True)
        gather(plan, args.out, head, states)
    return states


def gather(plan: Plan, out: Path, head: dict[str, Any], states: dict[str, dict[str, Any]]) -> None:
    """Collects; a file that cannot be read or written now is left for the next time."""
    about = {"wall_s": round(time.time() - _STARTED, 1), "steps": plan.chosen_steps()}
    try:
        collect(Path(plan.work), out, head | about | {"parts": states})
    except (OSError, ValueError) as err:
        print(f"not collected: {err}", flush=True)
    logs = [path.read_text(errors="replace") for path in sorted(Path(plan.work).glob("*.log"))]
    with contextlib.suppress(OSError):
        (out / "log.txt").write_text("\n".join(logs)[-4_000_000:])


def start(work: Path, name: str) -> "subprocess.Popen[bytes]":
    environment = os.environ | {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TQDM_DISABLE": "1",
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    with (work / f"{name}.log").open("wb") as log:
        log.write(f"== {name}\n".encode())
        log.flush()
        return subprocess.Popen(
            [sys.executable, str(_HERE), "--part", name, "--work", str(work)],
            stdout=log, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip


def ended(work: Path, name: str, code: int | None, seconds: float) -> dict[str, Any]:
    """Returns the status of a part; `code` None says that it was stopped at the deadline."""
    status = "ok" if code == 0 else "failed"
    state: dict[str, Any] = {"status": status, "seconds": round(seconds, 1)}
    if code is None:
        state |= {"status": "stopped", "error": "the time was over"}
    elif code != 0:
        lines = (work / f"{name}.log").read_text(errors="replace").splitlines()
        state["error"] = "\n".join(lines[-25:])
    return state


def run_part(name: str, work: str) -> int:
    faulthandler.enable()
    plan = Plan.read(work)
    if plan.device == "cuda":
        torch.set_num_threads(1)  # nothing much is computed on the host
    torch.manual_seed(0)
    part = Part(plan, name)
    began = time.time()
    PARTS[name](plan, part)
    part.notes["seconds"] = time.time() - began
    part.notes["peak_bytes"] = torch.cuda.max_memory_reserved() if plan.device == "cuda" else None
    part.save()
    return 0


def machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name(0) if device == "cuda" else platform.processor() or "cpu"
    row = {"device": name, "python": platform.python_version(), "cores": str(os.cpu_count())}
    for package in ("torch", "transformers", "peft", "sacrebleu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            row[package] = importlib.metadata.version(package)
    return row


if __name__ == "__main__":
    sys.exit(main())
