"""What rounded products and keys and values change: perplexity, answers of adapters, time, memory.

--quantization int8, int4 or bf16, and --kv-dtype bfloat16.

Perplexity and prompts need the folders of --data that bench/zoo/tasks.py names; what is not there
is skipped. Quality is measured with transformers' own attention and the edit by hand; time, with
the engine's own decode step, fp32 and the others in turn.
"""

import argparse
import asyncio
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redmux_adapters import Adapter, read_adapter
from redmux_adapters.bases.load import load_base, load_tokenizer
from redmux_bench.plain_model import edited, greedy
from redmux_bench.rounds import in_turn
from redmux_bench.server_process import ServerProcess
from redmux_bench.steps import TimedSteps
from redmux_bench.tables import print_table
from redmux_server.config import ServerConfig
from redmux_server.device import choose
from redmux_server.models.cpu.accelerate import pack_linears
from redmux_server.models.load_causal import load_causal
from redmux_server.registry.given import zoo_folder

sys.path.insert(0, str(Path(__file__).parent / "zoo"))
from tasks import TASKS

ANSWER_TOKENS = 32
WINDOW = 256  # tokens of text that are scored together
KEPT_WINDOW = 1024  # the same where keys and values are compared, which more tokens look at
PROMPT_TOKENS = 64  # before the timed steps
BATCHES = (1, 8, 32)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--precision", nargs="+", default=["int8"], choices=("int8", "int4", "bf16")
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--text-tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--prompts", type=int, default=16, help="for each adapter")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--parts", nargs="+", default=["quality", "kv", "time", "memory"])
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with torch.inference_mode():
        if "quality" in args.parts:
            quality(args)
        if "time" in args.parts:
            step_times(args)
    if "kv" in args.parts:
        asyncio.run(kept_in_bf16(args))
    if "memory" in args.parts:
        memory(args)


# --- quality -------------------------------------------------------------------------------------


def quality(args: argparse.Namespace) -> None:
    models = {}
    for name in ("fp32", *args.precision):
        models[name], tokenizer = load_base(args.model)
        pack_linears(models[name], name)
    for name, text in texts(args.data):
        ids = torch.tensor(tokenizer(text[: 8 * args.text_tokens])["input_ids"])
        ids = ids[: args.text_tokens].unfold(0, WINDOW, WINDOW)
        fp32, *others = (
            math.exp(-torch.cat([logprobs(m, row, 1)[0] for row in ids]).mean())
            for m in models.values()
        )
        found = [
            f"{precision} {rounded:.3f} ({rounded / fp32 - 1:+.2%})"
            for precision, rounded in zip(args.precision, others, strict=True)
        ]
        texts_of = f"{name}: {ids.numel()} tokens, perplexity fp32 {fp32:.3f}"
        print(", ".join([texts_of, *found]), flush=True)
    rows = []
    for name, adapter, prompts in conversations(args):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
        found = compare_answers(models, adapter, ids, tokenizer.eos_token_id)
        rows += [(name, precision, *row) for precision, row in found.items()]
    print_table(
        ("adapter", "precision", "prompts", "tokens", "same, forced", "|d logprob|", "same, free",
         "same answers"), rows,
    )  # fmt: skip


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
        render = adapter.prompt_format.render
        yield name, adapter, [render([{"role": "user", "content": user}]) for user in users]


def compare_answers(
    models: Mapping[str, Any], adapter: Adapter, prompts: list[list[int]], end: int
) -> dict[str, Sequence[object]]:
    """Returns how the others follow fp32's greedy answers, told them and on their own."""
    answers, scores = {}, {}
    for key, model in models.items():
        with edited(model, adapter.edits):
            answers[key] = greedy(model, prompts, ANSWER_TOKENS, end)
            scores[key] = [
                logprobs(model, torch.tensor(prompt + answer), len(prompt))
                for prompt, answer in zip(prompts, answers["fp32"], strict=True)
            ]
    return {
        name: _compare((answers["fp32"], scores["fp32"]), (answers[name], scores[name]))
        for name in models
        if name != "fp32"
    }


def _compare(fp32: tuple[Any, Any], other: tuple[Any, Any]) -> Sequence[object]:
    pairs = list(zip(fp32[1], other[1], strict=True))
    # fp32's best token is looked up anew: its padded batch and one long row may break ties apart.
    forced = torch.cat([a[1] == b[1] for a, b in pairs]).float().mean()
    delta = torch.cat([(a[0] - b[0]).abs() for a, b in pairs]).mean()
    free = list(zip(fp32[0], other[0], strict=True))
    num_same = sum(x == y for a, b in free for x, y in zip(a, b, strict=False))
    num_tokens = sum(len(a) for a, _ in free)
    equal = sum(a == b for a, b in free)
    return (len(free), num_tokens, f"{forced:.1%}", f"{delta:.4f}",
            f"{num_same / num_tokens:.1%}", f"{equal} of {len(free)}")  # fmt: skip


def logprobs(model: Any, ids: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Returns the logprobs of ids[first:] and the likeliest tokens in their places."""
    rows = model(input_ids=ids[None], use_cache=False).logits[0, first - 1 : -1].log_softmax(-1)
    return rows.gather(1, ids[first:, None])[:, 0], rows.argmax(-1)


async def kept_in_bf16(args: argparse.Namespace) -> None:
    """Scores texts by servers whose keys and values are kept in fp32 and in bf16."""
    tokenizer = load_tokenizer(args.model)
    for name, text in texts(args.data):
        ids = torch.tensor(tokenizer(text[: 8 * args.text_tokens])["input_ids"])
        windows = ids[: args.text_tokens].unfold(0, KEPT_WINDOW, KEPT_WINDOW).tolist()
        for quantization in ("none", *args.precision):
            found = {}
            for kept in ("float32", "bfloat16"):
                flags = ("--quantization", quantization, "--kv-dtype", kept)
                with ServerProcess("--model", args.model, *flags) as server:
                    async with server.client() as client:
                        scores = [await client.score(w, prompt_logprobs=True) for w in windows]
                told = [x for score in scores if score.prompt for x in score.prompt.logprobs]
                found[kept] = math.exp(-statistics.fmean(told))
            change = found["bfloat16"] / found["float32"] - 1
            print(
                f"{name}, {quantization}: perplexity {found['float32']:.4f} with keys and values "
                f"in fp32, {found['bfloat16']:.4f} in bf16 ({change:+.3%})", flush=True,
            )  # fmt: skip


# --- time and memory -----------------------------------------------------------------------------


def step_times(args: argparse.Namespace) -> None:
    """Times decode steps of all at each batch size, an adapter of its own for every request."""
    adapters = [read_adapter(path) for path in sorted(zoo_folder().iterdir()) if path.is_dir()]
    every = []
    for quantization in ("none", *args.precision):
        config = ServerConfig(
            model=args.model, device="cpu", threads=args.threads, kv_cache_tokens=8192,
            quantization=quantization,
        )  # fmt: skip
        steps = TimedSteps(load_causal(config, choose(config)), PROMPT_TOKENS, seed=0)
        for _ in range(max(BATCHES)):
            steps.fill(PROMPT_TOKENS)
        every.append(steps)
    for batch in BATCHES:
        used = list(itertools.islice(itertools.cycle(adapters), batch))
        calls = (partial(steps.decode_s, batch, PROMPT_TOKENS, used) for steps in every)
        timed = in_turn(args.rounds, *calls)
        found = [
            f"{name} {1e3 * statistics.median(times):.1f} ms (best {1e3 * min(times):.1f})"
            for name, times in zip(("fp32", *args.precision), timed, strict=True)
        ]
        print(f"decode step of {batch:2d}: {', '.join(found)}", flush=True)


def memory(args: argparse.Namespace) -> None:
    """Starts a server with each and prints what is resident then."""
    for name in ("none", *args.precision):
        with ServerProcess("--model", args.model, "--quantization", name) as server:
            resident = server.resident_bytes >> 20
            print(f"resident with quantization {name}: {resident} MiB", flush=True)


if __name__ == "__main__":
    main()
