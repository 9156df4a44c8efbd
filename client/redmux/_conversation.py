"""A chat's turns, and the file that they are saved in."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from redmux.types import Chunk


@dataclass(frozen=True, slots=True)
class Answer:
    """What made an answer: `finish_reason` is None for one that was stopped."""

    adapter: str | None
    digest: str | None
    finish_reason: str | None


@dataclass(slots=True)
class Conversation:
    """The turns so far, with the system prompt that every request brings."""

    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def messages(self, question: str) -> list[dict[str, str]]:
        """Returns the messages of a request that asks a question after all turns."""
        return [*self._all_turns(), {"role": "user", "content": question}]

    def add(self, question: str, answer: str, last: Chunk) -> None:
        """Adds a question and its answer, of which `last` was the last part."""
        self.turns.append({"role": "user", "content": question})
        self.turns.append({"role": "assistant", "content": answer})
        self.answers.append(Answer(last.adapter, last.digest, last.finish_reason))

    def reset(self) -> None:
        """Forgets all turns; the system prompt stays."""
        self.turns.clear()
        self.answers.clear()

    def save(self, path: Path, adapter: str | None) -> None:
        """Writes a JSON object, whole or not at all: what was there stays until all is written.

        Its `messages` are those of a request and of a training record; `answers` tells what made
        each of the assistant's. Raises OSError. The file is for its owner only.
        """
        content = {
            "adapter": adapter,
            "messages": self._all_turns(),
            "answers": [asdict(answer) for answer in self.answers],
        }
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file, ensure_ascii=False, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _all_turns(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]
