"""What --quantization int8 changes: perplexity, answers of the bundled adapters, time and memory.

Perplexity and prompts need the folders of --data that bench/zoo/tasks.py names; what is not there
is skipped. Quality is measured with transformers' own attention and the edit by hand; time, with
the engine's own decode step, fp32 and int8 in turn.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from redmux_adapters import Adapter, Edit, read_adapter
from redmux_adapters.bases.load import load_base
from redmux_server.config import ServerConfig
from redmux_server.device import choose
from redmux_server.engine.request import Request, SamplingParams, Work
from redmux_server.models.base_model import BaseModel
from redmux_server.models.cpu.accelerate import pack_linears
from redmux_server.models.kvcache import BLOCK
from redmux_server.models.load_causal import load_causal
from redmux_server.registry.given import zoo_folder

sys.path.insert(0, str(Path(__file__).parent / "zoo"))
from tasks import TASKS

ANSWER_TOKENS = 32
WINDOW = 256  # tokens of text that are scored together
PROMPT_TOKENS = 64  # before the timed steps


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--text-tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--prompts", type=int, default=16, help="for each adapter")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--parts", nargs="+", default=["quality", "time", "memory"])
    parser.add_argument("--print-rss", choices=["none", "int8"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.print_rss:
        _serve_nothing = load(args, args.print_rss)
        print(psutil.Process().memory_info().rss >> 20)
        return
    with torch.inference_mode():
        if "quality" in args.parts:
            quality(args)
        if "time" in args.parts:
            step_times(args)
    if "memory" in args.parts:
        memory(args)


# --- quality -------------------------------------------------------------------------------------


def quality(args: argparse.Namespace) -> None:
    models = {}
    for name in ("fp32", "int8"):
        models[name], tokenizer = load_base(args.model)
        pack_linears(models[name], name)
    for name, text in texts(args.data):
        ids = torch.tensor(tokenizer(text[: 8 * args.text_tokens])["input_ids"])
        ids = ids[: args.text_tokens].unfold(0, WINDOW, WINDOW)
        perplexities = {
            key: math.exp(-torch.cat([logprobs(m, row, 1)[0] for row in ids]).mean())
            for key, m in models.items()
        }
        change = perplexities["int8"] / perplexities["fp32"] - 1
        print(f"{name}: {ids.numel()} tokens, perplexity fp32 {perplexities['fp32']:.3f}, "
              f"int8 {perplexities['int8']:.3f} ({change:+.1%})", flush=True)  # fmt: skip
    print(f"{'adapter':16} {'prompts':>7} {'tokens':>6} {'same, forced':>12} "
          f"{'|d logprob|':>11} {'same, free':>10} {'same answers':>12}")  # fmt: skip
    for name, adapter, prompts in conversations(args):
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
        compare_answers(name, models, adapter, rows, tokenizer.eos_token_id)


def texts(data: Path) -> Iterator[tuple[str, str]]:
    plays = data / "shakespeare" / "test.modern.nltktok"
    answers = data / "alpaca_eval" / "outputs.json"
    for path in (plays, answers):
        if not path.is_file():
            print(f"skipped: no {path}")
    if plays.is_file():
        yield "shakespeare, modern", plays.read_text(encoding="utf-8")
    if answers.is_file():
        items = json.loads(answers.read_text(encoding="utf-8"))
        yield "alpaca_eval answers", "\n\n".join(item["output"] for item in items)


def conversations(args: argparse.Namespace) -> Iterator[tuple[str, Adapter, list[str]]]:
    """Prompts from each task's test data, or the two bundled ones."""
    demo = json.loads((zoo_folder() / "demo.json").read_text(encoding="utf-8"))
    for name, task in TASKS.items():
        if not (zoo_folder() / name).is_dir():
            continue  # measured, not bundled
        adapter = read_adapter(zoo_folder() / name)
        try:
            users = [example.user for example in task.load(args.data, "test")[: args.prompts]]
        except FileNotFoundError as err:
            print(f"{name}: bundled prompts only, no {err.filename}")
            users = [item["prompt"] for item in demo if item["adapter"] == name]
        assert adapter.prompt_format is not None
        yield (
            name,
            adapter,
            [adapter.prompt_format.render([{"role": "user", "content": user}]) for user in users],
        )


def compare_answers(
    name: str, models: Mapping[str, Any], adapter: Adapter, prompts: list[list[int]], end: int
) -> None:
    """Prints how int8 follows fp32's greedy answers, told them and on its own."""
    answers, scores = {}, {}
    for key, model in models.items():
        with edited(model, adapter.edits):
            answers[key] = greedy(model, prompts, end)
            scores[key] = [
                logprobs(model, torch.tensor(prompt + answer), len(prompt))
                for prompt, answer in zip(prompts, answers["fp32"], strict=True)
            ]
    pairs = list(zip(scores["fp32"], scores["int8"], strict=True))
    # fp32's best token is looked up anew: its padded batch and one long row may break ties apart.
    forced = torch.cat([a[1] == b[1] for a, b in pairs]).float().mean()
    delta = torch.cat([(a[0] - b[0]).abs() for a, b in pairs]).mean()
    free = [(a, b) for a, b in zip(answers["fp32"], answers["int8"], strict=True)]
    num_same = sum(x == y for a, b in free for x, y in zip(a, b, strict=False))
    num_tokens = sum(len(a) for a, _ in free)
    equal = sum(a == b for a, b in free)
    print(f"{name:16} {len(prompts):7d} {num_tokens:6d} {forced:12.1%} {delta:11.4f} "
          f"{num_same / num_tokens:10.1%} {equal:5d} of {len(free)}", flush=True)  # fmt: skip


@contextmanager
def edited(model: Any, edits: Mapping[str, Edit]) -> Iterator[None]:
    def hook(edit: Edit) -> Any:
        return lambda module, args, h: h * edit.scale + edit.bias

    sites = {path: model.get_submodule(path) for path in edits}
    handles = [site.register_forward_hook(hook(edits[path])) for path, site in sites.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def greedy(model: Any, prompts: list[list[int]], end: int) -> list[list[int]]:
    """Returns at most ANSWER_TOKENS tokens for each prompt, up to its end."""
    width = max(map(len, prompts))
    ids = torch.tensor([[end] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    new = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False,
        eos_token_id=end, pad_token_id=end,
    )[:, width:].tolist()  # fmt: skip
    return [row[: row.index(end) + 1] if end in row else row for row in new]


def logprobs(model: Any, ids: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Returns the logprobs of ids[first:] and the likeliest tokens in their places."""
    rows = model(input_ids=ids[None], use_cache=False).logits[0, first - 1 : -1].log_softmax(-1)
    return rows.gather(1, ids[first:, None])[:, 0], rows.argmax(-1)


# --- time and memory -----------------------------------------------------------------------------


def load(args: argparse.Namespace, quantization: str) -> BaseModel:
    config = ServerConfig(
        model=args.model, device="cpu", threads=args.threads, kv_cache_tokens=8192,
        quantization=quantization,
    )  # fmt: skip
    return load_causal(config, choose(config))


def step_times(args: argparse.Namespace) -> None:
    """Times decode steps of both at each batch size, an adapter of its own for every request."""
    models = {name: load(args, name) for name in ("none", "int8")}
    for reason in models["int8"].reasons:
        print(reason)
    adapters = [read_adapter(path) for path in sorted(zoo_folder().iterdir()) if path.is_dir()]
    for batch in (1, 8, 32):
        requests = {name: prefilled(model, adapters, batch) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(args.rounds):
            for name, model in models.items():
                started = time.perf_counter()
                decode(model, requests[name])
                times[name].append(1e3 * (time.perf_counter() - started))
        fp32, int8 = (statistics.median(times[name]) for name in models)
        print(f"decode step of {batch:2d}: fp32 {fp32:.1f} ms, int8 {int8:.1f} ms, ratio "
              f"{fp32 / int8:.2f}", flush=True)  # fmt: skip


def prefilled(model: BaseModel, adapters: Sequence[Adapter], batch: int) -> list[Request]:
    requests = []
    for i in range(batch):
        adapter = adapters[i % len(adapters)]
        request = Request(
            prompt_ids=[(7 * i + 31 * j) % 1000 + 100 for j in range(PROMPT_TOKENS)],
            max_tokens=BLOCK, sampling=SamplingParams(), stop_token_ids=frozenset(), tenant="",
            adapter=adapter, logprobs=False, sink=lambda event: None,
        )  # fmt: skip
        blocks = request.max_length // BLOCK
        request.blocks = list(range(i * blocks, (i + 1) * blocks))
        request.slot = model.bank.acquire(adapter.digest, adapter.edits)
        model.runner.forward([Work(request, PROMPT_TOKENS)])
        request.num_computed = PROMPT_TOKENS
        requests.append(request)
    decode(model, requests)  # warm up
    return requests


def decode(model: BaseModel, requests: Sequence[Request]) -> None:
    for request in requests:
        request.token_ids.append(7)
    model.runner.forward([Work(request, 1) for request in requests])
    for request in requests:
        request.num_computed += 1


def memory(args: argparse.Namespace) -> None:
    """Loads each in a process of its own and prints what is resident afterwards."""
    for name in ("none", "int8"):
        command = [sys.executable, __file__, "--model", args.model, "--print-rss", name]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(f"resident with quantization {name}: {out.split()[-1]} MiB", flush=True)


if __name__ == "__main__":
    main()
