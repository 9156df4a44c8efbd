"""Job: what a caller asked to be trained, how far it is, and who watches it. No I/O."""

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum

from redmux_adapters.train import Evaluated, Stepped

_MOST_UNREAD = 4096  # events that a watcher may be behind; the oldest are dropped then


class JobState(Enum):
    """Where a job is; the last three are ends."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


class TaskState(Enum):
    """Where one adapter of a job is; all but the first two are ends."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    STOPPED_EARLY = "stopped early"
    DIVERGED = "diverged"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class JobTask:
    """One adapter of a job: what it will take, and how far it is."""

    name: str  # of the adapter
    num_steps: int
    num_examples: int
    num_held_out: int
    state: TaskState = TaskState.QUEUED
    detail: str = ""  # why it is no success
    step: int = 0
    loss: float | None = None  # of the last step's batch
    best: Evaluated | None = None
    num_tokens: int = 0
    digest: str = ""  # of the published adapter
    is_publishing: bool = False  # has ended well; its adapter is being put

    @property
    def has_ended(self) -> bool:
        """Whether nothing about it will change any more."""
        return self.state not in (TaskState.QUEUED, TaskState.RUNNING)

    def end(self, state: TaskState, detail: str = "") -> None:
        """Ends it, unless it has ended before."""
        if not self.has_ended:
            self.state, self.detail = state, detail

    def take(self, event: Stepped | Evaluated) -> None:
        """Notes progress."""
        if isinstance(event, Stepped):
            self.step, self.loss = event.step, event.loss
            self.num_tokens += event.num_tokens
        elif event.is_best:
            self.best = event


@dataclass(slots=True, eq=False)
class Job:
    """A job of one tenant. `payload` is what the training process is sent, until it is sent.

    Belongs to the event loop.
    """

    tenant: str
    tasks: list[JobTask]
    payload: bytes
    replace: bool
    request_id: str = ""
    id: str = field(default_factory=lambda: f"job-{secrets.token_hex(8)}")
    state: JobState = JobState.QUEUED
    detail: str = ""
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    started_at: datetime | None = None
    ended_at: datetime | None = None
    is_cancelled: bool = False  # its tenant asked for its end
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _watchers: list["_Watcher"] = field(default_factory=list)

    def task(self, name: str) -> JobTask | None:
        """Returns the task of an adapter's name."""
        return next((task for task in self.tasks if task.name == name), None)

    def start(self) -> None:
        """Says that its turn has come."""
        self.state, self.started_at = JobState.RUNNING, datetime.now(UTC)
        for task in self.tasks:
            if not task.has_ended:
                task.state = TaskState.RUNNING
        self.changed()

    def end(self, state: JobState, detail: str = "") -> None:
        """Ends the job, and with it the tasks that have not ended."""
        rest = TaskState.CANCELLED if state is JobState.CANCELLED else TaskState.FAILED
        for task in self.tasks:
            task.end(rest, detail)
        self.state, self.detail, self.ended_at = state, detail, datetime.now(UTC)
        self.payload = b""
        self.ended.set()
        self.changed()

    def progressed(self, event: Stepped | Evaluated) -> None:
        """Notes a step or an evaluation and tells the watchers."""
        task = self.task(event.task)
        if task is not None and not task.has_ended:
            task.take(event)
            self._tell(event)

    def changed(self) -> None:
        """Tells the watchers that a state has changed."""
        self._tell(self)

    async def watch(self) -> AsyncGenerator["Job | Stepped | Evaluated", None]:
        """Yields the job itself first, at every change of a state and last; events in between.

        Whoever reads too slowly misses the oldest steps, never the end.
        """
        watcher = _Watcher()
        self._watchers.append(watcher)
        try:
            yield self
            while not self.ended.is_set() or watcher.unread:
                for event in await watcher.take():
                    yield event
        finally:
            self._watchers.remove(watcher)

    def _tell(self, event: "Job | Stepped | Evaluated") -> None:
        for watcher in self._watchers:
            watcher.put(event)


class _Watcher:
    """What one reader of a job has not read yet."""

    def __init__(self) -> None:
        self.unread: deque[Job | Stepped | Evaluated] = deque(maxlen=_MOST_UNREAD)
        self._has_news = asyncio.Event()

    def put(self, event: Job | Stepped | Evaluated) -> None:
        self.unread.append(event)
        self._has_news.set()

    async def take(self) -> list[Job | Stepped | Evaluated]:
        await self._has_news.wait()
        self._has_news.clear()
        events = list(self.unread)
        self.unread.clear()
        return events


def in_order_of_turns(queued: Iterable[Job], last_turn: Mapping[str, int]) -> list[Job]:
    """Returns queued jobs, given in the order of their creation, in that of their training.

    The next is always the first of the tenant whose last turn is the longest ago; turns count
    upwards.
    """
    left, turns, ordered = list(queued), dict(last_turn), []
    while left:
        job = min(left, key=lambda job: turns.get(job.tenant, -1))
        left.remove(job)
        ordered.append(job)
        turns[job.tenant] = max(turns.values(), default=-1) + 1
    return ordered
