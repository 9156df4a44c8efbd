"""An engine without a model: logits come from a script."""

import asyncio
import dataclasses

import torch

from redmux_adapters import Adapter, Edit
from redmux_server.engine.bank import AdapterBank
from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.engine import Engine
from redmux_server.engine.grammar import bar_tokens
from redmux_server.engine.request import Failed, Finished, Request, SamplingParams, Token
from redmux_server.engine.scheduler import Scheduler
from redmux_server.metrics import Metrics

VOCAB = 8
BLOCK = 4
POISON = 6  # a prompt that holds this token makes forward raise
NAN = 5  # a prompt that holds this one makes its logits NaN
SITES = {"site": 3}


class FakeRunner:
    """Draws (last token + 1) % 4; keeps a list of the batches that it was asked for.

    Its cache remembers for what each place was written; what is found there for somebody else is
    noted in `misreads`.
    """

    def __init__(self):
        self.batches = []
        self.cache = {}
        self.misreads = []
        self.spoiled = set()  # requests whose logits are NaN from now on
        self.entered = 0
        self.before = lambda work: None  # a hook of the test

    def enter_thread(self):
        self.entered += 1

    def forward(self, work):
        self.batches.append([item.request for item in work])
        self.before(work)
        rows = []
        for item in work:
            request = item.request
            self.attend(item)
            if POISON in request.prompt_ids:
                raise RuntimeError("a secret of the kernel")
            token_ids = [*request.token_ids[: request.num_computed], *item.token_ids]
            for place in item.wanted if item.samples else ():
                row = self.row(request, token_ids[: request.num_computed + place + 1])
                if NAN in request.prompt_ids or request in self.spoiled:
                    row[2] = float("nan")
                rows.append(row)
        return torch.stack(rows) if rows else torch.zeros(0, VOCAB)

    def row(self, request, token_ids):
        """Logits behind these tokens."""
        row = torch.zeros(VOCAB)
        row[(token_ids[-1] + 1) % 4] = 9
        return row

    def hidden(self, work):
        """States of 3 values: the token's id, and NaN for NAN."""
        self.batches.append([item.request for item in work])
        self.before(work)
        states = []
        for item in work:
            first = item.request.num_computed
            ids = torch.tensor(item.request.token_ids[first : first + item.count])
            self.attend(item)
            if POISON in item.request.prompt_ids:
                raise RuntimeError("a secret of the kernel")
            ids = torch.where(ids == NAN, float("nan"), ids.float())
            states.append(ids[:, None].expand(-1, 3))
        return states

    def attend(self, item):
        request = item.request
        digest = request.adapter and request.adapter.digest
        token_ids = [*request.token_ids[: request.num_computed], *item.token_ids]
        made_by = [digest if place in request.edited else None for place in range(len(token_ids))]
        for position in range(len(token_ids)):
            where = request.blocks[position // BLOCK], position % BLOCK
            before = zip(token_ids[: position + 1], made_by, strict=False)
            content = request.owner, tuple(before)
            if position >= request.num_computed:
                self.cache[where] = content
            elif self.cache.get(where) != content:
                self.misreads.append((request, position))


@dataclasses.dataclass
class Parts:
    engine: Engine
    runner: FakeRunner
    scheduler: Scheduler
    bank: AdapterBank
    pool: BlockPool
    metrics: Metrics

    @property
    def is_idle(self):
        """Whether nobody holds blocks, slots or a place in the batch."""
        return (
            self.pool.num_free == self.pool.num_blocks
            and self.bank.num_uses == 0
            and not self.scheduler.running
            and not self.scheduler.num_waiting
        )

    def step(self):
        """What the engine's thread does once, and the delivery of its events."""
        self.engine._take_inbox(block=False)
        self.engine.step()
        self.engine._deliver(self.engine._stepper.take_events())


class FreeRows:
    """A cost of steps by which every draft pays, unless rows have a price."""

    def __init__(self, row_s=0.0):
        self.row_s = row_s

    def of(self, rows):
        return 1 + self.row_s * rows

    def learn(self, rows, seconds):
        pass


def make_parts(
    *, max_open=10, max_running=4, num_blocks=16, max_batch_tokens=8, drafts=None,
    bar=bar_tokens, **options
) -> Parts:  # fmt: skip
    pool = BlockPool(num_blocks, BLOCK)
    scheduler = Scheduler(
        pool, max_running=max_running, max_batch_tokens=max_batch_tokens, **options
    )
    bank = AdapterBank(
        SITES, device=torch.device("cpu"), dtype=torch.float32, max_bytes=0, min_slots=5
    )
    runner, metrics = FakeRunner(), Metrics()
    engine = Engine(runner, scheduler, bank, metrics, max_open=max_open, drafts=drafts, bar=bar)
    return Parts(engine, runner, scheduler, bank, pool, metrics)


def run(parts, *callers, limit=200):
    """Submits callers' requests, steps until all have ended, and returns how many steps computed.

    Nothing is held then by anybody.
    """
    for caller in callers:
        parts.engine.submit(caller.request)
    for _ in range(limit):
        if not parts.engine.num_open:
            assert parts.is_idle
            assert not parts.runner.misreads
            return len(parts.runner.batches)
        parts.step()
    raise AssertionError("requests are open after many steps")


class Caller:
    """A request and the events that reached it."""

    def __init__(self, prompt=(0,), max_tokens=3, **options):
        self.events = []
        self.ended = asyncio.Event()
        self.first = asyncio.Event()
        values = {
            "sampling": SamplingParams(), "stop_token_ids": frozenset(), "tenant": "",
            "adapter": None, "logprobs": False,
        }  # fmt: skip
        self.request = Request(
            prompt_ids=list(prompt), max_tokens=max_tokens, sink=self.take, **values | options
        )

    def take(self, event):
        self.events.append(event)
        self.first.set()
        if not isinstance(event, Token):
            self.ended.set()

    @property
    def tokens(self):
        return [event.token_id for event in self.events if isinstance(event, Token)]

    @property
    def endings(self):
        return [event for event in self.events if not isinstance(event, Token)]

    @property
    def error(self):
        (ending,) = self.endings
        assert isinstance(ending, Failed)
        assert self.events[-1] is ending
        return ending.error

    @property
    def reason(self):
        (ending,) = self.endings
        assert isinstance(ending, Finished)
        assert self.events[-1] is ending
        return ending.reason


def make_adapter(seed=0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    edit = Edit(*(torch.randn(3, generator=generator) for _ in range(2)))
    return Adapter(base_fingerprint="fake", edits={"site": edit})
