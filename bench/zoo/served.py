"""Scores the bundled adapters as a server answers with them, on the zoo's test texts.

    python bench/zoo/served.py --data .gpu/zoo-data --json served.json

Starts `redmux serve` (fp32 where the CPU serves), asks it by the client for every test text of
every adapter, all of them mixed, and scores the answers as bench/zoo/run.py does.
"""

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from redmux_bench.checkout import ROOT

# isort: split
from examples import Example, read_examples
from found import label, score_names, written
from restyle import restyled
from tasks import TASKS
from tqdm import tqdm

from redmux import AsyncClient
from redmux_bench.server_process import ServerProcess
from redmux_bench.tables import markdown

ZOO = ROOT / "adapters" / "redmux_adapters" / "zoo"
_MIXING_SEED = 0
_TIMEOUT_S = 900.0  # for an answer on a machine that others use
Question = tuple[str, int]  # task, number of its test text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py filled")
    parser.add_argument("--zoo", type=Path, default=ZOO, help="folder of adapters named as tasks")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="all of the folder")
    parser.add_argument("--limit", type=int, default=250, help="test texts of each task")
    parser.add_argument("--concurrency", type=int, default=32, help="requests at once")
    parser.add_argument("--json", type=Path, help="where scores and answers are written")
    args = parser.parse_args(argv)
    tasks = args.tasks or [name for name in TASKS if (args.zoo / name).is_dir()]
    examples = {task: test_examples(args.data, task, args.limit) for task in tasks}
    adapters = [f"--adapters={task}={args.zoo / task}" for task in tasks]
    with ServerProcess("--model", args.model, *adapters) as server:
        report = asyncio.run(ask_all(server.address, examples, args.concurrency))
    for task, row in report["tasks"].items():
        row["scores"] = TASKS[task].score(examples[task], row["answers"])
    if args.json:
        args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    print(summary(report))


def test_examples(data: Path, task: str, limit: int) -> list[Example]:
    """Returns the test texts that run.py scores, too."""
    examples = read_examples(data / f"{task}.test.jsonl")[:limit]
    style = TASKS[task].style
    return examples if style is None else restyled(style, examples, "test", {})


async def ask_all(
    address: str, examples: dict[str, list[Example]], concurrency: int
) -> dict[str, Any]:
    """Returns the answers in the order of the examples, with what answered."""
    questions = [(task, i) for task, rows in examples.items() for i in range(len(rows))]
    random.Random(_MIXING_SEED).shuffle(questions)
    places = asyncio.Semaphore(concurrency)
    progress = tqdm(total=len(questions), unit="answer", disable=None)
    async with AsyncClient(address, timeout_s=_TIMEOUT_S) as client:

        async def ask(question: Question) -> tuple[Question, str]:
            task, number = question
            message = {"role": "user", "content": examples[task][number].user}
            async with places:
                answer = await client.generate(
                    [message], adapter=task, max_tokens=TASKS[task].max_new_tokens
                )
            progress.update()
            return question, answer.text.strip()

        answers = dict(await asyncio.gather(*map(ask, questions)))
        info = await client.info()
        digests = {adapter.name: adapter.digest async for adapter in client.adapters.list()}
    progress.close()
    return {
        "server": {"device": info.device, "dtype": info.dtype, "version": info.version},
        "tasks": {
            task: {
                "digest": digests[task], "n": len(rows),
                "answers": [answers[task, i] for i in range(len(rows))],
            }
            for task, rows in examples.items()
        },
    }  # fmt: skip


def summary(report: dict[str, Any]) -> str:
    """Returns a table of all scores."""
    rows = [
        [task, label(score), str(row["n"]), written(score, row["scores"][score])]
        for task, row in report["tasks"].items()
        for score in score_names(row["scores"])
    ]
    return markdown(["adapter", "score", "n", "served"], rows, left=2)


if __name__ == "__main__":
    main()
