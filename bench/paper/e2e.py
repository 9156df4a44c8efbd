"""Trains RED and RED++ on the E2E NLG data together, serves them, and scores what they write.

python bench/paper/e2e.py --model gpt2-medium --recipe gpt2-medium --device cuda \
    --train trainset.csv --valid devset.csv --test testset_w_refs.csv --work e2e --out e2e.json
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from redmux import AsyncClient
from redmux_adapters import read_adapter
from redmux_adapters.train.cli import main as train
from redmux_adapters.train.job import read_job
from redmux_bench import report
from redmux_bench.nlg_scores import score
from redmux_bench.server_process import ServerProcess

_CONCURRENCY = 16
_SCORES = ("bleu", "nist", "meteor", "rouge_l", "cider")


def main() -> int:
    """Runs the recipe; an interrupted training goes on where it was."""
    options = _arguments()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    for part in ("train", "valid"):
        pairs = _pairs(getattr(options, part))[: options.limit_valid if part == "valid" else None]
        lines = (json.dumps({"prompt": mr + options.end, "completion": ref}) for mr, ref in pairs)
        (work / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    job = work / "job.json"
    description = json.dumps(_job(options), indent=1)
    if job.exists() and job.read_text() != description:
        sys.exit(f"{work} holds a run of other options; give another --work")
    job.write_text(description)
    methods = options.methods.split(",")
    described = read_job(job, {})
    folders = {method: described.folder(method) for method in methods}
    if not all((folder / "adapter_config.json").exists() for folder in folders.values()):
        threads = ["--threads", str(options.threads)] if options.threads else []
        if train(["--job", str(job), "--resume", *threads]):
            return 1
    references: dict[str, list[str]] = {}
    for mr, ref in _pairs(options.test):
        references.setdefault(mr, []).append(ref)
    references = dict(list(references.items())[: options.limit_test])
    rows = []
    for method, texts in _generate(options, folders, list(references)).items():
        (work / f"{method}.txt").write_text("\n".join(texts) + "\n")
        edits = read_adapter(folders[method]).edits.values()
        rows.append({
            "method": method, "values": sum(2 * edit.scale.numel() for edit in edits),
            "num_texts": len(texts), **asdict(score(texts, list(references.values()))),
        })  # fmt: skip
    groups = ("\n".join(refs) + "\n" for refs in references.values())
    (work / "references.txt").write_text("\n".join(groups))
    report.print_table(
        ("method", "values", "BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"),
        [(r["method"], f"{r['values']:,}", *(f"{r[name]:.2f}" for name in _SCORES)) for r in rows],
    )
    run = {key: getattr(options, key) for key in ("recipe", "seed", "steps", "command_line")}
    result = {"model": Path(options.model).name, **run, "machine": report.machine(), "rows": rows}
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="a decoder, as redmux serve takes it")
    parser.add_argument("--recipe", default="smollm2", help="a model under [e2e] in recipes.toml")
    parser.add_argument("--methods", default="red,redpp")
    for part in ("train", "valid", "test"):
        parser.add_argument(f"--{part}", required=True, help="CSV file with columns mr and ref")
    parser.add_argument("--limit-valid", type=int, default=200, help="pairs to choose the best by")
    parser.add_argument("--limit-test", type=int, help="meaning representations to write for")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the recipe's epochs")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--work", default="e2e", help="folder for the run and its texts")
    parser.add_argument("--out", default="e2e.json", help="file for the results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of training; 0: torch's choice")
    options = parser.parse_args()
    options.command_line = " ".join(["e2e.py", *sys.argv[1:]])
    options.is_chat = options.recipe == "smollm2"
    # GPT-2 was trained by the authors on: facts, end of text, sentence, end of text.
    options.end = "" if options.is_chat else "<|endoftext|>"
    return options


def _pairs(path: str) -> list[tuple[str, str]]:
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        return [(row["mr"], row["ref"]) for row in csv.DictReader(file)]


def _job(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the job file of `redmux train`."""
    recipes = tomllib.loads(Path(__file__).with_name("recipes.toml").read_text())
    tasks = []
    for method in options.methods.split(","):
        values = {**recipes["methods"][method], **recipes["e2e"][options.recipe][method]}
        values["eval_every"] = 500
        if options.steps:
            values |= {"steps": options.steps, "eval_every": options.steps}
        tasks.append({
            "name": method, "data": "train.jsonl", "valid": "valid.jsonl", "seed": options.seed,
            "prompt_format": "chatml" if options.is_chat else "raw", **values,
        })  # fmt: skip
    run = {"base": options.model, "device": options.device, "checkpoint_every": 10}
    return {**run, "output": "adapters", "tasks": tasks}


def _generate(
    options: argparse.Namespace, folders: Mapping[str, Path], prompts: Sequence[str]
) -> Mapping[str, list[str]]:
    """Returns what each adapter writes for the prompts, greedily, all adapters at once."""
    flags = ["--model", options.model, "--max-running", str(_CONCURRENCY)]
    if options.threads:
        flags += ["--threads", str(options.threads)]
    free = asyncio.Semaphore(_CONCURRENCY)

    async def write(client: AsyncClient, adapter: str, prompt: str) -> str:
        message = [{"role": "user", "content": prompt}]
        async with free:
            completion = await client.generate(
                message if options.is_chat else prompt + options.end,
                adapter=adapter, max_tokens=96, temperature=0,
            )  # fmt: skip
        return completion.text.partition("\n")[0].strip()

    async def write_all(address: str) -> Mapping[str, list[str]]:
        async with AsyncClient(address) as client:
            for method, folder in folders.items():
                await client.adapters.put(method, folder)
            texts = await asyncio.gather(*(write(client, m, p) for m in folders for p in prompts))
        size = len(prompts)
        return {m: list(texts[i * size : (i + 1) * size]) for i, m in enumerate(folders)}

    with ServerProcess(*flags) as server:
        return asyncio.run(write_all(server.address))


if __name__ == "__main__":
    sys.exit(main())
