"""Trains RED and RED++ on the E2E NLG data together, serves them, and scores what they write.

python bench/paper/e2e.py --model gpt2-medium --recipe gpt2-medium --device cuda \
    --train trainset.csv --valid devset.csv --test testset_w_refs.csv --work e2e --out e2e.json
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipe import RECIPES, about, num_values, parser_of, server, train_all, write_results

from redmux import AsyncClient
from redmux_bench.nlg_scores import score
from redmux_bench.tables import print_table

_CONCURRENCY = 16
_SCORES = ("bleu", "nist", "meteor", "rouge_l", "cider")


def main() -> int:
    """Runs the recipe; an interrupted training goes on where it was."""
    options = _arguments()
    limits = {"train": None, "valid": options.limit_valid}
    records = {
        f"{part}.jsonl": [
            {"prompt": mr + options.end, "completion": ref}
            for mr, ref in _pairs(getattr(options, part))[:limit]
        ]
        for part, limit in limits.items()
    }
    folders = train_all(options, _tasks(options), records)
    references: dict[str, list[str]] = {}
    for mr, ref in _pairs(options.test):
        references.setdefault(mr, []).append(ref)
    references = dict(list(references.items())[: options.limit_test])
    rows = []
    for method, texts in _generate(options, folders, list(references)).items():
        Path(options.work, f"{method}.txt").write_text("\n".join(texts) + "\n")
        rows.append({
            "method": method, "values": num_values(folders[method]), "num_texts": len(texts),
            **asdict(score(texts, list(references.values()))),
        })  # fmt: skip
    groups = ("\n".join(refs) + "\n" for refs in references.values())
    Path(options.work, "references.txt").write_text("\n".join(groups))
    print_table(
        ("method", "values", "BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"),
        [(r["method"], f"{r['values']:,}", *(f"{r[name]:.2f}" for name in _SCORES)) for r in rows],
    )
    write_results(options.out, rows, **about(options))
    return 0


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, "e2e", model="smollm2", recipe="smollm2", methods="red,redpp")
    for part in ("train", "valid", "test"):
        parser.add_argument(f"--{part}", required=True, help="CSV file with columns mr and ref")
    parser.add_argument("--limit-valid", type=int, default=200, help="pairs to choose the best by")
    parser.add_argument("--limit-test", type=int, help="meaning representations to write for")
    options = parser.parse_args()
    options.is_chat = options.recipe == "smollm2"
    # GPT-2 was trained by the authors on: facts, end of text, sentence, end of text.
    options.end = "" if options.is_chat else "<|endoftext|>"
    return options


def _pairs(path: str) -> list[tuple[str, str]]:
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        return [(row["mr"], row["ref"]) for row in csv.DictReader(file)]


def _tasks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the tasks of the job: a method each."""
    tasks = []
    for method in options.methods.split(","):
        recipe = RECIPES["e2e"][options.recipe]
        values = {**RECIPES["methods"][method], **recipe["options"], **recipe[method]}
        values["eval_every"] = 500
        if options.steps:
            values |= {"steps": options.steps, "eval_every": options.steps}
        tasks.append({
            "name": method, "data": "train.jsonl", "valid": "valid.jsonl", "seed": options.seed,
            "prompt_format": "chatml" if options.is_chat else "raw", **values,
        })  # fmt: skip
    return tasks


def _generate(
    options: argparse.Namespace, folders: Mapping[str, Path], prompts: Sequence[str]
) -> Mapping[str, list[str]]:
    """Returns what each adapter writes for the prompts, greedily, all adapters at once."""
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

    with server(options, _CONCURRENCY) as process:
        return asyncio.run(write_all(process.address))


if __name__ == "__main__":
    sys.exit(main())
