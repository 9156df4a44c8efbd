"""Engine: the one thread that runs the model, one step after the other."""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from redmux.errors import AbortedError, UnavailableError
from redmux_server.engine.bank import AdapterBank
from redmux_server.engine.drafts import Drafts
from redmux_server.engine.grammar import Bar, bar_tokens
from redmux_server.engine.places import Places
from redmux_server.engine.reading import Reader
from redmux_server.engine.request import Event, Failed, Finished, Request, Scored, Token
from redmux_server.engine.scheduler import Scheduler
from redmux_server.engine.stepper import Runner, Stepper
from redmux_server.metrics import Metrics

logger = logging.getLogger(__name__)


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
        drafts: Drafts | None = None,
        bar: Bar = bar_tokens,
    ) -> None:
        """`max_open` bounds the requests that wait or run, of which each tenant has its share.

        `reader` applies the heads of adapters, where the model has any. `drafts` is for models
        whose results do not depend on what is computed beside them. `bar` takes out what grammars
        bar, in the way that suits the runner's logits best.
        """
        self._runner = runner
        self._scheduler = scheduler
        self._metrics = metrics
        self._stepper = Stepper(
            runner, scheduler, bank, metrics, reader or Reader(), bar, drafts
        )  # fmt: skip
        self._places = Places(max_open)
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        # Owned by the event loop's thread.
        self._open: dict[Request, _Stamps] = {}
        self._is_draining = False
        self._stuck_step: int | None = None  # one that does not end, as it seems
        self._drained = asyncio.Event()
        self._has_ended = asyncio.Event()  # some request, since whoever waits last looked
        self.died = asyncio.Event()
        # Written by the engine thread, read by anyone.
        self._is_stopping = False
        self._num_steps = 0
        self._is_waiting = False  # for requests, between two steps

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

    @property
    def kv_used_ratio(self) -> float:
        """The share of cache blocks in use."""
        return self._scheduler.kv_used_ratio

    def running_adapters(self) -> Counter[str]:
        """Returns the number of rows of the current steps by digest, "" for the base model."""
        running = tuple(self._scheduler.running)
        return Counter(r.adapter.digest if r.adapter is not None else "" for r in running)

    def open_digests(self) -> tuple[set[str], set[str]]:
        """Returns the digests of the adapters of running requests, and of those that wait."""
        running = set(self._scheduler.running)
        found: tuple[set[str], set[str]] = (set(), set())
        for request in self._open:
            if request.adapter is not None:
                found[request not in running].add(request.adapter.digest)
        return found

    @property
    def most_for_one(self) -> int:
        """How many requests a tenant may have open that is alone."""
        return self._places.most_for_one

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread.is_alive()

    @property
    def step_under_way(self) -> int | None:
        """The number of the step that is being computed, None between two steps."""
        return None if self._is_waiting else self._num_steps

    def submit(self, *requests: Request) -> None:
        """Accepts requests of one tenant, all or none: each one's sink gets exactly one ending.

        Followers are accepted with the request that they follow. Raises ResourceExhaustedError if
        the queue or the tenant's share of it is full, FailedPreconditionError for an adapter in
        quarantine, and UnavailableError while draining or while a step does not end.
        """
        if self._is_draining or self.died.is_set():
            raise UnavailableError("the server is shutting down")
        if self._stuck_step is not None and self._stuck_step == self.step_under_way:
            raise UnavailableError("the server computes a step that does not end")
        for request in requests:
            if request.adapter is not None:
                self._stepper.quarantine.check(request.adapter.digest)
        accepted = [one for request in requests for one in (request, *request.followers)]
        self._places.take(accepted)
        now = time.monotonic()
        self._open |= {request: _Stamps(now) for request in accepted}
        for request in requests:
            self._inbox.put(request)

    async def submit_in_turn(self, request: Request) -> None:
        """Accepts a request as `submit` does, but waits for a place where there is none.

        For the parts of what was accepted as a whole, of which the caller bounds the number.
        """
        while not self._places.has_place(request.tenant):
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

    async def stop(self, limit_s: float | None = None) -> None:
        """Ends the engine thread after its current step, for which it waits `limit_s` seconds.

        Open requests fail as unavailable. Where the step does not end, `is_alive` stays true.
        """
        self._is_draining = True
        self._is_stopping = True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, limit_s)
        if self._thread.is_alive():
            self._fail_open("the server was stopped in a step that did not end")
        else:
            self._fail_open("the server is shutting down", may_be_the_cause=False)

    def give_up_step(self) -> None:
        """Fails every open request, and refuses others until the step under way has ended."""
        self._stuck_step = self.step_under_way
        self._fail_open("the server computes a step that does not end")

    def _fail_open(self, what: str, *, may_be_the_cause: bool = True) -> None:
        """Ends every open request; with those that ran no other server should be tried.

        Clients send again what was unavailable. If a request is the cause of what has happened, it
        would happen to one server after the other.
        """
        running = set(self._scheduler.running) if may_be_the_cause else set()
        endings = []
        for request in self._open:
            error = AbortedError(f"{what}; this request was part of it, and may be the reason")
            ending = Failed(error if request in running else UnavailableError(what))
            self.end(request, ending)
            endings.append((request, ending))
        self._deliver(endings)

    def _bury(self) -> None:
        self.died.set()
        self._deliver(self._stepper.take_events())
        self._fail_open("the server's engine died")

    def _hand_over(self, events: Sequence[tuple[Request, Event]]) -> None:
        try:
            self._deliver(events)
        except Exception:
            logger.critical("what the engine computed could not be delivered", exc_info=True)
            self._is_stopping = True
            self.died.set()

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
                self._places.give_back(request)
                self._has_ended.set()
                self._metrics.ended(event, now - stamps.submitted_s)
            request.sink(event)
        if self._is_draining and not self._open:
            self._drained.set()

    # -- engine thread's side -----------------------------------------------------------------

    def run(self) -> None:
        """Steps until `stop`; sleeps while there is nothing to do.

        An error that is not a single step's computation means that the engine's own state cannot
        be trusted: it ends, every open request fails, and `died` is set.
        """
        try:
            self._runner.enter_thread()
            self._run()
        except BaseException:
            logger.critical("the engine died", exc_info=True)
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._bury)

    def _run(self) -> None:
        while not self._is_stopping:
            has_work = bool(self._scheduler.running) or self._scheduler.num_waiting > 0
            self._is_waiting = True
            self._take_inbox(block=not has_work)
            self._num_steps += 1
            self._is_waiting = False
            if not self._is_stopping:
                self.step()

    def step(self) -> None:
        """Runs one step and hands its events over."""
        self._stepper.step()
        if self._loop is not None and (events := self._stepper.take_events()):
            self._loop.call_soon_threadsafe(self._hand_over, events)

    def _take_inbox(self, block: bool) -> None:
        try:
            request = self._inbox.get(block)
            while True:
                if request is not None:
                    self._scheduler.submit(request)
                request = self._inbox.get_nowait()
        except queue.Empty:
            pass
