"""Engine: the one thread that runs the model, one step after the other."""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from redmux.errors import (
    FailedPreconditionError,
    RedmuxError,
    ResourceExhaustedError,
    UnavailableError,
)
from redmux_server.engine.bank import AdapterBank
from redmux_server.engine.reading import Reader
from redmux_server.engine.request import (
    Event,
    Failed,
    Finished,
    FinishReason,
    Read,
    Request,
    Scored,
    Token,
    Work,
)
from redmux_server.engine.sampling import NonFinite, sample
from redmux_server.engine.scheduler import Scheduler
from redmux_server.engine.scoring import score
from redmux_server.metrics import Metrics

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 0.5


class Runner(Protocol):
    """What the engine asks of a model."""

    def enter_thread(self) -> None:
        """Is called once on the engine thread, before the first step."""

    def forward(self, work: Sequence[Work]) -> Tensor:
        """Computes a step and returns [n, vocab] logits, the rows that the work items want."""

    def hidden(self, work: Sequence[Work]) -> Sequence[Tensor]:
        """Computes a step and returns the last hidden states [count, hidden] of each work item."""


@dataclass(slots=True)
class _Stamps:
    """When things happened to a request, in seconds of time.monotonic()."""

    submitted_s: float
    last_token_s: float | None = None


class Engine:
    """Takes requests from the event loop, steps the model, hands events back to the loop.

    `submit` and `end` belong to the event loop's thread, everything else to the engine thread.
    There is one hand-over each way: a queue in, one `call_soon_threadsafe` per step out.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        bank: AdapterBank,
        metrics: Metrics,
        *,
        max_open: int,
        reader: Reader | None = None,
    ) -> None:
        """`max_open` bounds the requests that wait or run.

        `reader` applies the heads of adapters, where the model has any.
        """
        self._runner = runner
        self._scheduler = scheduler
        self._bank = bank
        self._metrics = metrics
        self._reader = reader or Reader()
        self.max_open = max_open
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        # Owned by the event loop's thread.
        self._open: dict[Request, _Stamps] = {}
        self._is_draining = False
        self._drained = asyncio.Event()
        self._has_ended = asyncio.Event()  # some request, since whoever waits last looked
        self.died = asyncio.Event()
        # Written by the engine thread, read by anyone.
        self._events: list[tuple[Request, Event]] = []
        self._is_stopping = False
        self.last_step_s = time.monotonic()

    # -- event loop's side --------------------------------------------------------------------

    def start(self) -> None:
        """Starts the engine thread; call it inside the event loop that will read the events."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Requests that were accepted and have not ended."""
        return len(self._open)

    @property
    def num_running(self) -> int:
        """Requests that are part of the current steps."""
        return len(self._scheduler.running)

    def is_stuck(self, limit_s: float) -> bool:
        """Whether there is work but no step has finished for `limit_s` seconds."""
        return not self._thread.is_alive() or (
            bool(self._open) and time.monotonic() - self.last_step_s > limit_s
        )

    def submit(self, *requests: Request) -> None:
        """Accepts requests, all or none: from here on each one's sink gets exactly one ending.

        Raises ResourceExhaustedError if the queue is full and UnavailableError while draining.
        """
        if self._is_draining or self.died.is_set():
            raise UnavailableError("the server is shutting down")
        if len(self._open) + len(requests) > self.max_open:
            raise ResourceExhaustedError(
                f"{len(self._open)} requests are open, the limit is {self.max_open}; "
                f"try again in {_RETRY_AFTER_S} s",
                retry_after_s=_RETRY_AFTER_S,
            )
        if not self._open:
            self.last_step_s = time.monotonic()
        for request in requests:
            self._open[request] = _Stamps(time.monotonic())
            self._inbox.put(request)

    async def submit_in_turn(self, request: Request) -> None:
        """Accepts a request as `submit` does, but waits for a place where there is none.

        For the parts of what was accepted as a whole, of which the caller bounds the number.
        """
        while len(self._open) >= self.max_open:
            self._has_ended.clear()
            await self._has_ended.wait()
        self.submit(request)

    def end(self, request: Request, event: Finished | Failed) -> None:
        """Ends a request with this event; the next step leaves it out.

        Harmless once it has ended.
        """
        request.early_end = request.early_end or event

    async def drain(self, timeout_s: float) -> None:
        """Refuses new requests and waits for the open ones, at most `timeout_s` seconds."""
        self._is_draining = True
        if self._open:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), timeout_s)

    def cut_draining(self) -> None:
        """Ends a `drain` that is under way at once."""
        self._drained.set()

    async def stop(self) -> None:
        """Ends the engine thread after its current step; open requests fail as unavailable."""
        self._is_draining = True
        self._is_stopping = True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._fail_open()

    def _fail_open(self) -> None:
        error = UnavailableError("the server is shutting down")
        self._deliver([(request, Failed(error)) for request in self._open])

    def _bury(self) -> None:
        self.died.set()
        self._fail_open()

    def _deliver(self, events: Sequence[tuple[Request, Event]]) -> None:
        now = time.monotonic()
        for request, event in events:
            stamps = self._open.get(request)
            if stamps is None:
                continue
            if isinstance(event, Token):
                if stamps.last_token_s is None:
                    self._metrics.first_token_s.observe(now - stamps.submitted_s)
                else:
                    self._metrics.inter_token_s.observe(now - stamps.last_token_s)
                stamps.last_token_s = now
            elif not isinstance(event, Scored):
                del self._open[request]
                self._has_ended.set()
                self._metrics.ended(event, now - stamps.submitted_s)
            request.sink(event)
        if self._is_draining and not self._open:
            self._drained.set()

    # -- engine thread's side -----------------------------------------------------------------

    def run(self) -> None:
        """Steps until `stop`; sleeps while there is nothing to do.

        An error that is not a single step's computation means that the engine's own state cannot
        be trusted: it ends, every open request fails as unavailable, and `died` is set.
        """
        try:
            self._runner.enter_thread()
            self._run()
        except Exception:
            logger.critical("the engine died", exc_info=True)
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._bury)

    def _run(self) -> None:
        while not self._is_stopping:
            has_work = bool(self._scheduler.running) or self._scheduler.num_waiting > 0
            self._take_inbox(block=not has_work)
            if not self._is_stopping:
                self.step()
                self.last_step_s = time.monotonic()

    def step(self) -> None:
        """Runs one step: leave out what was ended, plan, compute, draw, hand the events over."""
        for request in self._scheduler.ended_early():
            assert request.early_end is not None
            self._end(request, request.early_end)
        num_cached = self._scheduler.num_cached_tokens
        work = self._scheduler.plan()
        self._metrics.cached_tokens.inc(self._scheduler.num_cached_tokens - num_cached)
        if work:
            started_s = time.monotonic()
            num_decodes = sum(item.request.is_decoding for item in work)
            num_encoded = sum(
                len(item.request.source_ids) for item in work if not item.request.num_computed
            )
            self._acquire_slots(work)
            self._compute(work)
            self._metrics.step(work, num_decodes, num_encoded, time.monotonic() - started_s)
        self._metrics.state(self._scheduler, self._bank)
        if self._events and self._loop is not None:
            self._loop.call_soon_threadsafe(self._deliver, self._events)
            self._events = []

    def _take_inbox(self, block: bool) -> None:
        try:
            request = self._inbox.get(block)
            while True:
                if request is not None:
                    self._scheduler.submit(request)
                request = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _acquire_slots(self, work: Sequence[Work]) -> None:
        for item in work:
            request = item.request
            if request.adapter is not None and request.slot is None:
                started_s = time.monotonic()
                fills = self._bank.num_fills
                request.slot = self._bank.acquire(request.adapter.digest, request.adapter.edits)
                if self._bank.num_fills > fills:
                    self._metrics.adapter_load_s.observe(time.monotonic() - started_s)

    def _compute(self, work: Sequence[Work]) -> None:
        generating = [item for item in work if item.request.reading is None]
        reading = [item for item in work if item.request.reading is not None]
        try:
            results = {**self._draw(generating), **self._read(reading)}
        except Exception as err:
            self._recover(work, err)
            return
        for item in work:
            item.request.num_computed += item.count
            if item in results:
                self._take(item.request, results[item])

    def _draw(self, work: Sequence[Work]) -> dict[Work, Token | Scored | NonFinite]:
        return _evaluate(self._runner.forward(work), work) if work else {}

    def _read(self, work: Sequence[Work]) -> dict[Work, Read | NonFinite]:
        if not work:
            return {}
        states = dict(zip(work, self._runner.hidden(work), strict=True))
        ends = [item for item in work if item.samples]
        read = self._reader.read(
            [item.request for item in ends],
            [torch.cat([*item.request.states, states[item]]) for item in ends],
        )
        for item, part in states.items():  # nothing can fail any more
            item.request.states = [] if item.samples else [*item.request.states, part]
        return dict(zip(ends, read, strict=True))

    def _take(self, request: Request, result: Token | Scored | Read | NonFinite) -> None:
        match result:
            case NonFinite():
                name = "the base model" if request.adapter is None else request.adapter.digest
                message = f"{name} produced a value that is not finite for this prompt"
                self._fail(request, FailedPreconditionError(message))
            case Scored():
                self._events.append((request, result))
                if request.num_computed == len(request.prompt_ids):
                    self._end(request, Finished(FinishReason.SCORED))
            case Read():
                self._end(request, result)
            case Token():
                self._append(request, result)

    def _append(self, request: Request, result: Token) -> None:
        request.token_ids.append(result.token_id)
        self._events.append((request, result))
        reason = request.finish_reason()
        if reason is not None:
            self._end(request, Finished(reason))
        elif request.num_output == 1:  # its whole prompt is computed, and gave a finite row
            self._scheduler.share(request)

    def _fail(self, request: Request, error: RedmuxError) -> None:
        self._end(request, Failed(error), is_sound=False)

    def _end(self, request: Request, event: Event, *, is_sound: bool = True) -> None:
        self._scheduler.remove(request, is_sound=is_sound)
        if request.slot is not None:
            self._bank.release(request.slot)
            request.slot = None
        self._events.append((request, event))

    def _recover(self, work: Sequence[Work], err: Exception) -> None:
        """After a failed step, runs its requests one by one, so that only the culprit fails.

        Nothing was committed: computing the same tokens again writes the same cache entries.
        """
        if len(work) == 1:
            logger.error("a step failed for one request", exc_info=err)
            self._fail(work[0].request, RedmuxError("internal error in the engine"))
            return
        logger.error("a step of %d requests failed, running them one by one", len(work))
        for item in work:
            self._compute([item])


def _evaluate(logits: Tensor, work: Sequence[Work]) -> dict[Work, Token | Scored | NonFinite]:
    """Returns what the wanted rows of each work item come to, of those that want any."""
    results: dict[Work, Token | Scored | NonFinite] = {}
    drawing: list[Work] = []
    rows: list[int] = []  # of the logits of those that draw a token
    row = 0
    for item in work:
        wanted = item.wanted
        if item.request.targets and wanted:
            results[item] = score(logits[row : row + len(wanted)], item)
        elif wanted:
            drawing.append(item)
            rows.append(row)
        row += len(wanted)
    if drawing:
        drawn_logits = logits if len(rows) == len(logits) else logits[rows]
        tokens = sample(drawn_logits, [item.request for item in drawing])
        results.update(zip(drawing, tokens, strict=True))
    return results
