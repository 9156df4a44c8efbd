"""BatchService: batches of tenants, run a few lines at a time beside everything else."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from redmux.errors import (
    InvalidArgumentError,
    NotFoundError,
    RedmuxError,
    ResourceExhaustedError,
    UnavailableError,
)
from redmux_server.batches.batch import Batch
from redmux_server.batches.journal import Entry, Journal
from redmux_server.batches.lines import ENDPOINTS, Fault, Line, LineReader
from redmux_server.files.records import Records
from redmux_server.files.store import FileStore, new_id
from redmux_server.internal_errors import told

logger = logging.getLogger(__name__)

MAX_OUTPUT_BYTES = 64 << 20  # of the answers of one batch
_MOST_OPEN = 16  # of a tenant
_MOST_KEPT = 1000  # of a tenant that have ended
_ANSWERS = ".answers"
_CUT_SHORT = {
    "expired": "This request could not be executed before the completion window expired.",
    "cancelled": "This request was not executed before the batch was cancelled.",
    "output_too_large": f"This request was not executed: the answers before it have "
    f"{MAX_OUTPUT_BYTES} bytes, which is the limit of a batch.",
}


class Reply(NamedTuple):
    """The answer to a line. `retry_after_s` is None unless it is to be asked again later."""

    status: int
    body: bytes  # JSON
    retry_after_s: float | None = None


# Answers a line of a tenant: its endpoint, body, tenant and id.
Answer = Callable[[str, bytes, str, str], Awaitable[Reply]]


class BatchService:
    """Takes batches, and runs one of each tenant at a time.

    Belongs to the event loop. A tenant sees its own batches only.
    """

    def __init__(self, files: FileStore, folder: Path | None, num_at_once: int) -> None:
        """`num_at_once` is how many lines of all batches are answered at a time."""
        self._files = files
        self._folder = folder
        self._records = Records(folder, "batch")
        self._slots = asyncio.Semaphore(num_at_once)
        self._num_at_once = num_at_once
        self._batches: dict[str, Batch] = {}  # by id, in the order of their creation
        self._turns: dict[str, asyncio.Lock] = {}  # by tenant
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._work: dict[str, asyncio.Task[str]] = {}  # the part of a task that can be cancelled
        self._answer: Answer | None = None

    async def start(self, answer: Answer) -> None:
        """Takes batches from here on, and goes on with those that earlier runs left."""
        self._answer = answer
        for record in await asyncio.to_thread(self._records.load):
            try:
                batch = Batch(**record)
            except TypeError as err:
                logger.error("%s cannot be used: %s", record["id"], err)
                continue
            self._batches[batch.id] = batch
            if not batch.has_ended:
                logger.info("%s goes on", batch.id)
                self._begin(batch)
        # A kill in the last moment of a batch leaves its answers, which are in files by then.
        for path in [] if self._folder is None else self._folder.glob(f"*{_ANSWERS}"):
            if path.name.removesuffix(_ANSWERS) not in self._tasks:
                path.unlink(missing_ok=True)

    async def stop(self) -> None:
        """Ends what runs; where there is a folder, the next start goes on with it."""
        self._answer = None
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def create(
        self, endpoint: str, input_file_id: str, window_s: float, window: str,
        metadata: Mapping[str, str], tenant: str,
    ) -> Batch:  # fmt: skip
        """Takes a batch, to be complete within `window_s` seconds; `window` is how these were told.

        Raises InvalidArgumentError for another endpoint or a file for something else, NotFoundError
        for none, and ResourceExhaustedError for too many batches or no room for their answers.
        What is wrong inside the file is told by the batch.
        """
        if self._answer is None:
            raise UnavailableError("the server is shutting down")
        if endpoint not in ENDPOINTS:
            raise InvalidArgumentError(
                f"endpoint is {endpoint[:80]!r}, must be one of {', '.join(ENDPOINTS)}"
            )
        file = self._files.get(input_file_id, tenant, "input_file_id")
        if file.purpose != "batch":
            raise InvalidArgumentError(
                f"input_file_id is {file.id!r}, which was sent for {file.purpose}, not for batch"
            )
        own = [batch for batch in self._batches.values() if batch.tenant == tenant]
        if sum(not batch.has_ended for batch in own) >= _MOST_OPEN:
            raise ResourceExhaustedError(
                f"{_MOST_OPEN} batches are open already, which is the limit; cancel one or wait"
            )
        self._files.check_room(tenant)
        batch = Batch(tenant, endpoint, file.id, window, time.time() + window_s, metadata)
        self._batches[batch.id] = batch
        try:
            await self._write(batch)
        except RedmuxError:
            del self._batches[batch.id]
            raise
        logger.info("%s is created", batch.id)
        self._begin(batch)
        await self._forget_oldest(own)
        return batch

    def get(self, batch_id: str, tenant: str) -> Batch:
        """Returns a batch of the tenant; raises NotFoundError if there is none of that id."""
        batch = self._batches.get(batch_id)
        if batch is None or batch.tenant != tenant:
            raise NotFoundError(f"no batch {batch_id[:80]!r}; see GET /v1/batches")
        return batch

    def all_of(self, tenant: str) -> list[Batch]:
        """Returns the batches of a tenant, the newest first."""
        return [batch for batch in reversed(self._batches.values()) if batch.tenant == tenant]

    async def cancel(self, batch_id: str, tenant: str) -> Batch:
        """Ends a batch, which keeps the answers that it has, and returns it.

        Raises InvalidArgumentError where it has ended, or is about to.
        """
        batch = self.get(batch_id, tenant)
        if batch.status == "cancelling":
            return batch
        if batch.status not in ("validating", "in_progress"):
            raise InvalidArgumentError(f"{batch.id} is {batch.status}, which cannot be cancelled")
        batch.enter("cancelling")
        if batch.id in self._work:
            self._work[batch.id].cancel()
        await self._write(batch)
        return batch

    def _begin(self, batch: Batch) -> None:
        self._files.hold(batch.input_file_id, batch.id)
        task = self._tasks[batch.id] = asyncio.create_task(self._run(batch))

        def end(_: object) -> None:
            del self._tasks[batch.id]
            self._files.release(batch.input_file_id, batch.id)

        task.add_done_callback(end)

    async def _run(self, batch: Batch) -> None:
        try:
            await self._run_to_end(batch)
        except Exception as err:
            # Where the folder takes nothing any more, it is told as long as the server runs.
            self._fail(batch, [Fault("server_error", told(err).message)])
            with contextlib.suppress(RedmuxError):
                await self._write(batch)
        logger.info("%s %s", batch.id, batch.status)

    async def _run_to_end(self, batch: Batch) -> None:
        folder = self._folder
        journal = Journal(None if folder is None else folder / f"{batch.id}{_ANSWERS}")
        ending = batch.ending
        if not ending and batch.status != "cancelling":
            work = asyncio.create_task(self._answer_all(batch, journal))
            self._work[batch.id] = work
            try:
                ending = await work
            except asyncio.CancelledError:
                task = asyncio.current_task()
                assert task is not None
                if task.cancelling():
                    raise  # the server stops
            finally:
                del self._work[batch.id]
        if batch.status != "failed":
            await self._finish(batch, journal, ending or "cancelled")
        await self._write(batch)

    async def _answer_all(self, batch: Batch, journal: Journal) -> str:
        """Answers the lines that have no answer yet; returns how that ended."""
        try:
            async with asyncio.timeout(batch.expires_at - time.time()):
                lines, faults = await self._lines(batch)
                if faults:
                    self._fail(batch, faults)
                    return "failed"
                batch.num_lines = len(lines)
                batch.enter("in_progress")
                await self._write(batch)
                # The lines of those that wait for their turn are not kept in memory.
                del lines
                async with self._turns.setdefault(batch.tenant, asyncio.Lock()):
                    lines, _ = await self._lines(batch)
                    await self._answer_lines(
                        batch, await self._left(batch, lines, journal), journal
                    )
        except TimeoutError:
            return "expired"
        return "completed"

    async def _answer_lines(self, batch: Batch, lines: Sequence[Line], journal: Journal) -> None:
        left = iter(lines)

        async def work() -> None:
            for line in left:
                entry = _cut_short(line, "output_too_large")
                if journal.num_bytes < MAX_OUTPUT_BYTES:
                    entry = await self._answer_line(batch, line)
                await journal.add(entry)
                batch.count(entry)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._num_at_once, len(lines))):
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _answer_line(self, batch: Batch, line: Line) -> Entry:
        request_id = f"batch_req_{secrets.token_hex(12)}"
        while True:
            async with self._slots:
                assert self._answer is not None
                reply = await self._answer(
                    batch.endpoint, bytes(line.body), batch.tenant, request_id
                )
            if reply.retry_after_s is None:
                break
            await asyncio.sleep(reply.retry_after_s)
        response = {
            "status_code": reply.status, "request_id": request_id, "body": msgspec.Raw(reply.body)
        }  # fmt: skip
        return Entry.of(_encoded(line, request_id, response), reply.status == 200)

    async def _finish(self, batch: Batch, journal: Journal, ending: str) -> None:
        """Makes the files of a batch, in which every line is once, and ends it."""
        batch.ending = ending
        batch.enter("finalizing")  # before anything else can happen: it is not cancelled any more
        lines, faults = await self._lines(batch)
        if faults:  # it has ended before they were looked at
            lines = []
        batch.num_lines = len(lines)
        for line in await self._left(batch, lines, journal):
            entry = _cut_short(line, ending)
            await journal.add(entry)
            batch.count(entry)
        # Whoever goes on after a kill makes the same files.
        if batch.num_completed:
            batch.output_file_id = batch.output_file_id or new_id()
        if batch.num_failed:
            batch.error_file_id = batch.error_file_id or new_id()
        await self._write(batch)
        contents = await journal.contents()
        for file_id, kind, data in zip(
            (batch.output_file_id, batch.error_file_id), ("output", "error"), contents, strict=True
        ):
            if file_id is not None:
                name = f"{batch.id}_{kind}.jsonl"
                await self._files.keep(file_id, name, "batch_output", data, batch.tenant)
        batch.enter(ending)
        await self._write(batch)
        await journal.remove()

    async def _left(self, batch: Batch, lines: Sequence[Line], journal: Journal) -> list[Line]:
        """Returns the lines without an answer, after counting those with one."""
        done = await journal.load()
        batch.begin_to_count()
        for entry in done:
            batch.count(entry)
        have = {entry.custom_id for entry in done}
        return [line for line in lines if line.custom_id not in have]

    async def _lines(self, batch: Batch) -> tuple[list[Line], list[Fault]]:
        data = await self._files.read(self._files.get(batch.input_file_id, batch.tenant))
        return await asyncio.to_thread(LineReader(batch.endpoint).read, data)

    def _fail(self, batch: Batch, faults: Sequence[Fault]) -> None:
        batch.errors = [fault._asdict() for fault in faults]
        batch.enter("failed")

    async def _forget_oldest(self, own: Sequence[Batch]) -> None:
        for batch in [batch for batch in own if batch.has_ended][:-_MOST_KEPT]:
            del self._batches[batch.id]
            await self._records.remove(batch.id)

    async def _write(self, batch: Batch) -> None:
        await self._records.write(batch.id, asdict(batch))


def _cut_short(line: Line, reason: str) -> Entry:
    request_id = f"batch_req_{secrets.token_hex(12)}"
    error = {"code": f"batch_{reason}", "message": _CUT_SHORT[reason]}
    return Entry.of(_encoded(line, request_id, None, error), False)


def _encoded(line: Line, request_id: str, response: Any, error: Any = None) -> bytes:
    return msgspec.json.encode(
        {"id": request_id, "custom_id": line.custom_id, "response": response, "error": error}
    )
