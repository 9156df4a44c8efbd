"""Stepper: what one step of the engine does, and what becomes of each request in it."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from redmux.errors import DeadlineExceededError, FailedPreconditionError, RedmuxError
from redmux_server.engine.bank import AdapterBank
from redmux_server.engine.drafts import Drafts
from redmux_server.engine.grammar import Bar, MaskThread
from redmux_server.engine.quarantine import Quarantine
from redmux_server.engine.reading import Reader
from redmux_server.engine.request import (
    Event,
    Failed,
    Finished,
    FinishReason,
    Pooling,
    Read,
    Reading,
    Request,
    SamplingParams,
    Scored,
    Token,
    Work,
)
from redmux_server.engine.results import Drafted, Result, evaluate
from redmux_server.engine.sampling import Exhausted, NonFinite, sample
from redmux_server.engine.scheduler import Scheduler
from redmux_server.metrics import Metrics

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3  # in a row, before the base model is asked whether it works at all


class Runner(Protocol):
    """What the engine asks of a model."""

    def enter_thread(self) -> None:
        """Is called once on the engine thread, before the first step."""

    def forward(self, work: Sequence[Work]) -> Tensor:
        """Computes a step and returns [n, vocab] logits, the rows that the work items want."""

    def hidden(self, work: Sequence[Work]) -> Sequence[Tensor]:
        """Computes a step and returns the last hidden states [count, hidden] of each work item."""


class Stepper:
    """Plans steps, computes them and ends requests. Owned by the engine thread."""

    def __init__(
        self, runner: Runner, scheduler: Scheduler, bank: AdapterBank, metrics: Metrics,
        reader: Reader, bar: Bar, drafts: Drafts | None = None,
    ) -> None:  # fmt: skip
        """Without `drafts` a step draws one token of a request."""
        self._runner = runner
        self._scheduler = scheduler
        self._bank = bank
        self._metrics = metrics
        self._reader = reader
        self._drafts = drafts
        self._bar = bar
        self._masks = MaskThread()
        self.quarantine = Quarantine()
        self._events: list[tuple[Request, Event]] = []
        self._num_failures = 0  # of requests, since the last one of which something came

    def take_events(self) -> list[tuple[Request, Event]]:
        """Returns what has happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def step(self) -> None:
        """Runs one step: leave out what was ended, plan, compute, draw."""
        begun_s = time.monotonic()
        for request in self._scheduler.ended_early():
            assert request.early_end is not None
            self._end(request, request.early_end)
        for request in self._scheduler.overdue(time.monotonic()):
            self._end(request, Failed(_late(request)))
        num_cached = self._scheduler.num_cached_tokens
        work = self._scheduler.plan()
        for request in self._scheduler.sent_back:
            self._release_slot(request)
        self._metrics.sent_back.inc(len(self._scheduler.sent_back))
        self._metrics.cached_tokens.inc(self._scheduler.num_cached_tokens - num_cached)
        if work:
            if self._drafts is not None:
                work = self._drafts.add_to(work, self._scheduler.make_place)
            started_s = time.monotonic()
            num_decodes = sum(item.request.is_decoding for item in work)
            num_encoded = sum(
                len(item.request.source_ids) for item in work if not item.request.num_computed
            )
            self._acquire_slots(work)
            num_accepted = self._compute(work)
            for item in work:
                if item.draft and item.request.blocks:  # it goes on
                    self._scheduler.take_spare(item.request)
            self._metrics.step(
                work, num_decodes, num_encoded, num_accepted, time.monotonic() - started_s
            )
            if self._drafts is not None:
                self._drafts.learn(work)
                if num_decodes == len(work):
                    num_rows = sum(item.count for item in work)
                    self._drafts.learn_cost(num_rows, time.monotonic() - begun_s)
        self._metrics.state(self._scheduler, self._bank)

    def _acquire_slots(self, work: Sequence[Work]) -> None:
        for item in work:
            request = item.request
            if request.adapter is not None and request.slot is None:
                started_s = time.monotonic()
                fills = self._bank.num_fills
                request.slot = self._bank.acquire(request.adapter.digest, request.adapter.edits)
                if self._bank.num_fills > fills:
                    self._metrics.adapter_load_s.observe(time.monotonic() - started_s)
                    if self._drafts is not None:
                        self._drafts.keep(self._bank.holds)

    def _compute(self, work: Sequence[Work]) -> int:
        """Computes the work and takes in what it comes to; returns how many drafts were right."""
        generating = [item for item in work if item.request.reading is None]
        reading = [item for item in work if item.request.reading is not None]
        try:
            results, drafted = self._draw(generating)
            results |= self._read(reading)
        except Exception as err:
            self._recover(work, err)
            return 0
        for item in work:
            item.request.num_computed += item.num_known
            for request, result in results.get(item, ()):
                self._take(request, result)
        return self._draw_on(drafted)

    def _draw(
        self, work: Sequence[Work]
    ) -> tuple[dict[Work, list[tuple[Request, Result]]], list[Drafted]]:
        """Returns what comes of each work item, and the rows of logits behind that."""
        if not work:
            return {}, []
        masking = self._begin_masks([item.request for item in work if item.samples])
        try:
            logits = self._runner.forward(work)
        finally:
            if masking is not None:
                masking.result()
        return evaluate(logits, work, self._bar)

    def _begin_masks(self, requests: Sequence[Request]) -> Future[None] | None:
        """Begins to compute what may follow in the grammars of requests, where that is due."""
        matchers = [request.matcher for request in requests]
        stale = [m for m in matchers if m is not None and m.mask is None]
        return self._masks.begin(stale) if stale else None

    def _draw_on(self, drafted: Sequence[Drafted]) -> int:
        """Draws from the rows behind drafts for as long as what is drawn is what was drafted.

        One token after the other, so that each is drawn as in a step of its own: by all that came
        before it. Returns how many tokens of drafts were right.
        """
        num_accepted = 0
        for depth in range(max((len(one.draft) for one in drafted), default=0)):
            drafted = [one for one in drafted if one.holds(depth)]
            if not drafted:
                break
            requests = [one.request for one in drafted]
            try:
                if (masking := self._begin_masks(requests)) is not None:
                    masking.result()
                rows = torch.stack([one.rows[depth] for one in drafted])
                results = sample(rows, requests, self._bar)
            except Exception:
                # Nothing of it was committed: the next step meets it again, and tells whose it is.
                logger.exception("drawing from drafts failed")
                break
            for request, result in zip(requests, results, strict=True):
                self._scheduler.accept(request)
                self._take(request, result)
            num_accepted += len(drafted)
        return num_accepted

    def _read(self, work: Sequence[Work]) -> dict[Work, list[tuple[Request, Result]]]:
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
        return {item: [(item.request, got)] for item, got in zip(ends, read, strict=True)}

    def _take(self, request: Request, result: Result) -> None:
        if not isinstance(result, NonFinite):
            self._num_failures = 0
        match result:
            case NonFinite():
                name = "the base model" if request.adapter is None else request.adapter.digest
                message = f"{name} produced a value that is not finite for this prompt"
                if request.adapter is not None:
                    self.quarantine.failed(request.adapter.digest)
                self._fail(request, FailedPreconditionError(message))
            case Exhausted(why):
                self._end(request, Failed(FailedPreconditionError(why)))
            case Scored():
                self._events.append((request, result))
                if not request.draws and request.num_computed == len(request.prompt_ids):
                    self._end(request, Finished(FinishReason.SCORED))
            case Read():
                self._end(request, result)
            case Token():
                self._append(request, result)

    def _append(self, request: Request, result: Token) -> None:
        if request.followers:  # whose first tokens come next
            self._scheduler.fork(request)
        request.token_ids.append(result.token_id)
        self._events.append((request, result))
        if request.matcher is not None:
            request.matcher.take(result.token_id)
            if request.matcher.error:
                self._end(request, Failed(FailedPreconditionError(request.matcher.error)))
                return
        reason = request.finish_reason()
        if reason is not None:
            self._end(request, Finished(reason))
        elif request.num_output == 1:  # its whole prompt is computed, and gave a finite row
            self._scheduler.share(request)

    def _fail(self, request: Request, error: RedmuxError) -> None:
        self._end(request, Failed(error), is_sound=False)
        self._num_failures += 1
        if self._num_failures == _MAX_FAILURES:
            self._num_failures = 0
            self._probe(request)

    def _probe(self, failed: Request) -> None:
        """Computes a token of the bare base model, in the way of the request that failed.

        Raises what it raises, or RuntimeError for a value that is not finite.
        """
        probe = Request(
            prompt_ids=[0], max_tokens=0 if failed.reading else 1, sampling=SamplingParams(),
            stop_token_ids=frozenset(), tenant="", adapter=None, logprobs=False,
            sink=lambda event: None, source_ids=[0] if failed.source_ids else (),
            reading=Reading(Pooling.MEAN) if failed.reading else None,
        )  # fmt: skip
        if not self._scheduler.lend_blocks(probe):
            return  # others hold them all, and compute with them
        work = [Work(probe, 1)]
        results = self._read(work) if probe.reading else self._draw(work)[0]
        if any(isinstance(result, NonFinite) for _, result in results[work[0]]):
            raise RuntimeError("the base model computes values that are not finite")
        self._scheduler.take_back(probe)

    def _end(self, request: Request, event: Event, *, is_sound: bool = True) -> None:
        if request.adapter is not None and isinstance(event, Finished | Read):
            self.quarantine.passed(request.adapter.digest)
        self._scheduler.remove(request, is_sound=is_sound)
        self._release_slot(request)
        self._events += [(ended, event) for ended in (request, *request.followers)]

    def _release_slot(self, request: Request) -> None:
        if request.slot is not None:
            self._bank.release(request.slot)
            request.slot = None

    def _recover(self, work: Sequence[Work], err: Exception) -> None:
        """After a failed step, runs its requests one by one, so that only the culprit fails.

        Without their drafts, which are nobody's wish.

        Nothing was committed: computing the same tokens again writes the same cache entries.
        """
        if len(work) == 1 and not work[0].draft:
            logger.error("a step failed for one request", exc_info=err)
            self._fail(work[0].request, RedmuxError("internal error in the engine"))
            return
        logger.error("a step of %d requests failed, running them one by one", len(work))
        for item in work:
            self._compute([replace(item, count=item.num_known, draft=())])


def _late(request: Request) -> DeadlineExceededError:
    has_run = request.blocks or request.num_output  # and lost its place since
    done = f"after {request.num_output} tokens" if has_run else "before it was its turn"
    return DeadlineExceededError(f"the request's time was up {done}; give it more, or try later")
