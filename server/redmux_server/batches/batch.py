"""Batch: what a caller asked to be answered, and how far it is. No I/O."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from redmux_server.batches.journal import Entry

ENDS = frozenset(("failed", "completed", "expired", "cancelled"))


@dataclass(slots=True, eq=False)
class Batch:
    """A batch of one tenant; times are in seconds since the epoch. Belongs to the event loop."""

    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    expires_at: float
    metadata: Mapping[str, str] = field(default_factory=dict)
    id: str = field(default_factory=lambda: f"batch_{secrets.token_hex(12)}")
    created_at: float = field(default_factory=time.time)
    status: str = "validating"
    ending: str = ""  # the status that it will have once its files are there
    entered_at: dict[str, float] = field(default_factory=dict)  # status -> since when
    errors: list[dict[str, Any]] = field(default_factory=list)  # of the input file
    num_lines: int = 0
    num_completed: int = 0
    num_failed: int = 0
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing about it will change any more."""
        return self.status in ENDS

    def enter(self, status: str) -> None:
        """Goes on to another status."""
        self.status = status
        self.entered_at.setdefault(status, time.time())

    def begin_to_count(self) -> None:
        """Forgets what was counted, since it is counted again."""
        self.num_completed = self.num_failed = 0
        self.num_input_tokens = self.num_cached_tokens = self.num_output_tokens = 0

    def count(self, entry: Entry) -> None:
        """Counts one answer."""
        if not entry.is_output:
            self.num_failed += 1
            return
        self.num_completed += 1
        usage = entry.usage
        self.num_input_tokens += usage.prompt_tokens
        self.num_output_tokens += usage.completion_tokens
        if usage.prompt_tokens_details is not None:
            self.num_cached_tokens += usage.prompt_tokens_details.cached_tokens
