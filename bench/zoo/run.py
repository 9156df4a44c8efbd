"""Trains and scores the zoo on one GPU: RED, RED++, parts of RED, PEFT's LoRA and the bare base.

    python bench/zoo/run.py --base model.gguf --data .gpu/zoo-data --out results --deadline 330

Every part is a process; one that fails is reported, and the others still run. What there is so far
is in the output folder at any time.
"""

import argparse
import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

_STARTED = time.time()
_HERE = Path(__file__).resolve()
sys.path.insert(0, str(_HERE.parents[1]))
import redmux_bench.checkout  # noqa: E402, F401

# isort: split
import torch  # noqa: E402
from collect import collect  # noqa: E402
from part_base import base  # noqa: E402
from part_lora import lora  # noqa: E402
from part_red import ablations, more, red  # noqa: E402
from plan import PLAIN_NAME, Part, Plan  # noqa: E402
from restyle import plain_answers, style_questions  # noqa: E402
from tasks import TASKS  # noqa: E402

from redmux_adapters.bases.load import resolve  # noqa: E402
from redmux_bench.machine import device_and_versions  # noqa: E402

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
_SIZES = (
    "batch_size", "num_train", "num_valid", "num_test", "max_new_tokens", "max_pass_tokens"
)  # fmt: skip
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
        say(f"model in {folder}")
        own = {
            "base": folder, "data": str(args.data), "work": work, "device": device,
            "dtype": args.dtype or ("bfloat16" if device == "cuda" else "float32"),
            "tasks": tuple(args.tasks), "steps": max(4, round(args.steps * args.steps_scale)),
            "red_s": args.red_share * args.deadline,
            "deadline": _STARTED + args.deadline - _WRITE_S,
        }  # fmt: skip
        plan = Plan(**own, **{name: getattr(args, name) for name in _SIZES})
        plan.save()
        plain = style_questions(args.data, plan.tasks)
        if not args.smoke:
            plain = plain_answers(folder, list(plain), device)
        (Path(work) / PLAIN_NAME).write_text(json.dumps(plain), encoding="utf-8")
        if device == "cuda":
            torch.cuda.empty_cache()
        say("plain answers written")
        states = drive(plan, args)
        for name, state in states.items():
            print(f"{name:12} {state}")
    failed = [name for name, state in states.items() if state["status"] != "ok"]
    print(f"{time.time() - _STARTED:.1f} s, not ok: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def say(text: str) -> None:
    print(f"{time.time() - _STARTED:6.1f} s  {text}", flush=True)


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
    states: dict[str, dict[str, Any]] = {}
    cores = {"cores": str(os.cpu_count())}
    machine = device_and_versions(plan.device, "torch", "transformers", "peft", "sacrebleu") | cores
    head = {"plan": plan.__dict__, "machine": machine, "command": sys.argv}
    red_is_trained = Path(plan.work) / "part-red.trained"

    def may_start(name: str) -> bool:
        waits = name not in FIRST and "red" in args.parts
        return not waits or red_is_trained.exists() or "red" in states

    def run(name: str) -> None:
        while not may_start(name) and plan.remaining_s() > 0:
            time.sleep(_POLL_S)
        if plan.remaining_s() < (0 if args.smoke else _LEAST_S):
            states[name] = {"status": "not started", "error": "too little time was left"}
            return
        say(f"{name} starts")
        states[name] = run_process(plan, name)
        say(f"{name}: {states[name]}")

    with ThreadPoolExecutor(args.parallel) as pool:
        running = {pool.submit(run, name) for name in args.parts}
        while running:
            ended, running = wait(running, _COLLECT_S)
            for future in ended:
                future.result()  # raises what was wrong here, and not in the part
            gather(plan, args.out, head, states)
    return states


def run_process(plan: Plan, name: str) -> dict[str, Any]:
    """Runs a part to its end, or to the deadline, and returns how it ended."""
    environment = os.environ | {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TQDM_DISABLE": "1",
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    command = [sys.executable, str(_HERE), "--part", name, "--work", plan.work]
    path, began = Path(plan.work, f"{name}.log"), time.time()
    path.write_text(f"== {name}\n")
    state: dict[str, Any] = {"status": "ok"}
    try:
        with path.open("ab") as log:
            subprocess.run(
                command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment,
                timeout=plan.remaining_s(),
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        state = {"status": "stopped", "error": "the time was over"}
    except subprocess.CalledProcessError:
        lines = path.read_text(errors="replace").splitlines()
        state = {"status": "failed", "error": "\n".join(lines[-25:])}
    return state | {"seconds": round(time.time() - began, 1)}


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


if __name__ == "__main__":
    sys.exit(main())
