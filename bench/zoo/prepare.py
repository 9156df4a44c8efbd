"""Makes the zoo's data of the published files: one folder of JSONL files, a few megabytes.

python bench/zoo/prepare.py --data ../shared/data --out .gpu/zoo-data
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import redmux_bench.checkout  # noqa: F401

# isort: split
from examples import SPLITS, Example, write_examples
from tasks import TASKS, Task

_LIMITS = {"train": 6500, "valid": 200, "test": 250}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="data sets")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        for split in SPLITS:
            chosen = select(task, args.data, split)
            write_examples(args.out / f"{name}.{split}.jsonl", chosen)
            print(f"{name:16} {split:6} {len(chosen):6,} examples")


def select(task: Task, data: Path, split: str) -> list[Example]:
    """Returns a split of bounded size; no test text is in the training data."""
    chosen = task.load(data, split)
    if split == "train":
        chosen = [Example(e.user, e.target) for e in chosen]
    if split == "test":
        seen = {e.user for part in ("train", "valid") for e in task.load(data, part)}
        chosen = [e for e in chosen if e.user not in seen]
    return chosen[: _LIMITS[split]]


if __name__ == "__main__":
    main()
