"""The test texts of the zoo's adapters, as prompts."""

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from redmux import InvalidArgumentError
from redmux_adapters import Adapter, read_adapter
from redmux_bench.checkout import ROOT
from redmux_server.models.base_model import BaseModel
from redmux_server.registry.given import zoo_folder

# Those whose answers are more than a word.
BUNDLED = ("booking", "banking", "assistant-json", "restaurant")
BASE = "base"


@dataclass(frozen=True, slots=True)
class Subject:
    """An adapter, or the base model, and prompts that it was not asked yet."""

    name: str
    adapter: Adapter | None
    prompts: list[list[int]]

    def take(self, count: int) -> list[list[int]]:
        """Returns the next prompts; each comes once."""
        if count > len(self.prompts):
            raise InvalidArgumentError(
                f"there are too few test texts of {self.name}; lower --rounds, --learned or "
                "--concurrency"
            )
        taken, self.prompts[:] = self.prompts[:count], self.prompts[count:]
        return taken


def read_subjects(model: BaseModel, data: Path, others: Mapping[str, str]) -> list[Subject]:
    """Returns the bundled adapters, those at the paths of `others`, and the base model.

    The base model is asked what all adapters are, in turn.
    """
    paths = {name: zoo_folder() / name for name in BUNDLED}
    paths |= {name: Path(path) for name, path in others.items()}
    subjects, asked = [], []
    for name, path in paths.items():
        adapter, texts = read_adapter(path), _texts(data, name)
        subjects.append(Subject(name, adapter, _prompts(model, adapter, texts)))
        asked.append(texts)
    mixed = [text for texts in zip(*asked, strict=False) for text in texts]
    return [*subjects, Subject(BASE, None, _prompts(model, None, mixed))]


def _prompts(model: BaseModel, adapter: Adapter | None, texts: Sequence[str]) -> list[list[int]]:
    prompt_format = None if adapter is None else adapter.prompt_format
    chats = ([{"role": "user", "content": text}] for text in texts)
    return [model.codec.encode_chat(chat, prompt_format).ids for chat in chats]


def _texts(data: Path, name: str) -> list[str]:
    """Returns what bench/zoo scores: of its own folder, or of the published files."""
    prepared = data / f"{name}.test.jsonl"
    if prepared.is_file():
        lines = prepared.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["user"] for line in lines]
    sys.path.insert(0, str(ROOT / "bench" / "zoo"))
    try:
        task = importlib.import_module("tasks").TASKS[name]
        examples = importlib.import_module("prepare").select(task, data, "test")
    except (ImportError, KeyError, OSError) as err:
        raise InvalidArgumentError(
            f"there are no test texts of {name} in {data}; --data is a folder of the published "
            f"data sets or one that bench/zoo/prepare.py has filled ({err})"
        ) from err
    return [example.user for example in examples]
