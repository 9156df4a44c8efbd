"""The scheduler against a simple model of what it promises."""

from collections import Counter, deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from redmux.errors import RequestCancelledError
from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.request import Failed, Request, SamplingParams
from redmux_server.engine.scheduler import Scheduler

BLOCK = 4


def request(num_prompt, max_tokens, tenant="t", num_source=0, **options):
    return Request(
        source_ids=list(range(num_source)),
        prompt_ids=list(range(num_prompt)), max_tokens=max_tokens, sampling=SamplingParams(),
        stop_token_ids=frozenset(), tenant=tenant, adapter=None, logprobs=False,
        sink=lambda event: None, **options,
    )  # fmt: skip


def expected_blocks(request, block_size=BLOCK):
    """What a request may be expected to hold: as much again, two blocks more at least."""
    length = len(request.token_ids) + max(request.num_output, 2 * block_size)
    length = request.max_length if request.source_ids else min(length, request.max_length)
    return -(-length // block_size)


def check_blocks(scheduler, before):
    """Right behind a plan: everybody holds what is needed for what is known of it.

    Only the oldest may lack a block, if nobody else can give way.
    """
    for running in scheduler.running:
        needed = running.max_length if running.source_ids else len(running.token_ids)
        lacks = scheduler._blocks.blocks_for(needed) - len(running.blocks)
        if lacks:
            assert (lacks, running, scheduler._blocks.num_free) == (1, before[0], 0)
            assert not any(r.is_decoding for r in scheduler.running if r is not running)
            assert scheduler.running[len(before) :] == []


def commit(scheduler, work):
    """What the engine does after a step; returns the requests that ended."""
    ended = []
    for item in work:
        one, samples = item.request, item.samples
        one.num_computed += item.count
        if samples:
            one.token_ids.append(1)
            if one.finish_reason() is not None:
                ended.append(one)
        elif not one.draws and one.num_computed == len(one.prompt_ids):
            ended.append(one)  # scored
    for done in ended:
        scheduler.remove(done)
    return ended


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(8, 24), max_running=st.integers(1, 5), extra=st.integers(0, 12)
    )
    def start(self, num_blocks, max_running, extra):
        self.pool = BlockPool(num_blocks, BLOCK)
        self.budget = max_running + extra
        self.max_running = max_running
        self.scheduler = Scheduler(
            self.pool, max_running=max_running, max_batch_tokens=self.budget, prefix_cache=False
        )
        self.queues = {}  # tenant -> requests in the order of their turns, not yet admitted
        self.open = []

    @rule(
        num_prompt=st.integers(1, 20), max_tokens=st.integers(1, 12) | st.integers(20, 90),
        tenant=st.sampled_from("abc"), priority=st.sampled_from([-3, 0, 0, 0, 7]),
    )  # fmt: skip
    def submit(self, num_prompt, max_tokens, tenant, priority):
        most = self.pool.num_blocks * BLOCK - num_prompt
        self.add(request(num_prompt, min(max_tokens, most), tenant, priority=priority))

    @rule(num_prompt=st.integers(1, 32), tenant=st.sampled_from("abc"))
    def score(self, num_prompt, tenant):
        self.add(request(num_prompt, 0, tenant, targets=[1] * num_prompt))

    def add(self, new):
        self.scheduler.submit(new)
        self.enqueue(new, is_first=False)
        self.open.append(new)

    def enqueue(self, new, is_first):
        queue = self.queues.setdefault(new.tenant, deque())
        behind = [r.priority < new.priority or (r.priority == new.priority and not is_first)
                  for r in queue]  # fmt: skip
        queue.insert(sum(behind), new)

    @rule()
    def step(self):
        before = list(self.scheduler.running)
        decoding = [r for r in before if r.is_decoding]
        num_held = Counter(r.tenant for r in before)
        work = self.scheduler.plan()
        assert bool(work) == bool(self.open)
        assert sum(w.count for w in work) <= self.budget
        gone = self.scheduler.sent_back
        check_blocks(self.scheduler, before)
        if gone and set(self.scheduler.running) <= set(before):  # for lack of blocks
            assert before[0] not in gone
            assert all(r in decoding for r in gone)
        for one in gone:
            num_held[one.tenant] -= 1
            self.enqueue(one, is_first=True)
        if not set(self.scheduler.running) <= set(before):  # to others whose turn it is
            assert all(num_held[one.tenant] > 0 for one in gone)  # a tenant keeps one at least
        before = [r for r in before if r not in gone]
        decoding = [
            r for r in decoding if r in before and len(r.blocks) * BLOCK >= len(r.token_ids)
        ]
        self.check_nobody_waits_in_vain(work, gone)
        assert [w.request for w in work[: len(decoding)]] == decoding
        assert all(w.count == 1 for w in work[: len(decoding)])
        assert len({id(w.request) for w in work}) == len(work)
        for item in work:
            assert item.count >= 1
            assert item.request.num_computed + item.count <= len(item.request.token_ids)
        for admitted in self.scheduler.running[len(before) :]:
            assert self.queues[admitted.tenant].popleft() is admitted
        for ended in commit(self.scheduler, work):
            assert ended.num_output == ended.max_tokens
            self.open.remove(ended)

    def check_nobody_waits_in_vain(self, work, gone):
        """Whoever's turn it is lacks a row, tokens of the step, or blocks that others may need."""
        running, num_waiting = self.scheduler.running, self.scheduler.num_waiting
        lacks_block = any(len(r.blocks) * BLOCK < len(r.token_ids) for r in running)
        is_full = len(running) == self.max_running or sum(w.count for w in work) == self.budget
        if gone or lacks_block or is_full or not num_waiting:
            return
        heads = [line.first for line in self.scheduler._waiting.values()]
        needed = max(map(expected_blocks, heads)) + sum(map(expected_blocks, running))
        assert needed > self.pool.num_blocks
        # So one that waits would wait as well if each held its whole length.
        whole = max(r.max_length for r in heads) + sum(r.max_length for r in running)
        assert whole > (self.pool.num_blocks - len(running) - 1) * BLOCK

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end_early(self, data):
        gone = data.draw(st.sampled_from(self.open))
        gone.early_end = Failed(RequestCancelledError("gone"))
        assert self.scheduler.ended_early() == [gone]
        self.scheduler.remove(gone)
        self.open.remove(gone)
        if gone in self.queues[gone.tenant]:
            self.queues[gone.tenant].remove(gone)

    @invariant()
    def blocks_are_held_once_and_suffice(self):
        held = [b for r in self.scheduler.running for b in r.blocks]
        assert len(held) == len(set(held))
        assert len(held) + self.pool.num_free == self.pool.num_blocks
        for running in self.scheduler.running:
            least, most = running.num_computed, len(running.token_ids)
            assert -(-least // BLOCK) <= len(running.blocks) <= -(-most // BLOCK)

    @invariant()
    def limits_hold(self):
        assert len(self.scheduler.running) <= self.max_running
        assert len(self.scheduler.running) + self.scheduler.num_waiting == len(self.open)
        assert len(self.scheduler._served) <= 2 * 3 + 64 + 1

    def teardown(self):
        if hasattr(self, "open"):
            for _ in range(10_000):
                if not self.open:
                    break
                self.step()
            assert self.open == []
            assert self.pool.num_free == self.pool.num_blocks


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def make(num_blocks=100, **limits):
    return Scheduler(
        BlockPool(num_blocks, BLOCK), **{"max_running": 2, "max_batch_tokens": 8} | limits
    )


def run_until_admitted(scheduler, wanted, limit=1000):
    for steps in range(limit):
        if wanted in scheduler.running:
            return steps
        commit(scheduler, scheduler.plan())
    raise AssertionError("never admitted")


def test_a_flood_of_one_tenant_does_not_delay_another():
    scheduler = make()
    for _ in range(100):
        scheduler.submit(request(4, 4, "flood"))
    for _ in range(5):
        commit(scheduler, scheduler.plan())
    late = request(4, 4, "other")
    scheduler.submit(late)
    # At most until one of the running requests ends: 4 tokens of output each.
    assert run_until_admitted(scheduler, late) <= 6


def test_an_idle_tenant_saves_no_credit():
    scheduler = make(max_running=1)
    for _ in range(40):
        scheduler.submit(request(4, 4, "busy"))
    for _ in range(60):
        commit(scheduler, scheduler.plan())
    for _ in range(40):
        scheduler.submit(request(4, 4, "newcomer"))
    order = []
    while len(order) < 20:
        before = set(scheduler.running)
        work = scheduler.plan()
        order += [r.tenant for r in scheduler.running if r not in before]
        commit(scheduler, work)
    assert 8 <= order.count("newcomer") <= 12


def test_a_big_request_is_not_starved_by_small_ones():
    scheduler = make(num_blocks=10, max_running=4)
    scheduler.submit(request(4, 8, "small"))
    commit(scheduler, scheduler.plan())
    big = request(20, 20, "big")  # needs the whole cache
    scheduler.submit(big)
    for _ in range(50):
        scheduler.submit(request(4, 8, "small"))
    assert run_until_admitted(scheduler, big) <= 12


def test_a_long_prompt_is_cut_to_the_budget_and_decodes_go_on():
    scheduler = make(max_running=2, max_batch_tokens=5)
    short = request(2, 20)
    scheduler.submit(short)
    commit(scheduler, scheduler.plan())
    scheduler.submit(request(17, 2))
    counts = []
    while (work := scheduler.plan()) and len(counts) < 5:
        counts.append([w.count for w in work])
        assert work[0].request is short
        commit(scheduler, work)
    assert counts == [[1, 4], [1, 4], [1, 4], [1, 4], [1, 1]]


def test_counters_are_forgotten_with_their_tenants():
    scheduler = make()
    for i in range(500):
        scheduler.submit(request(1, 1, f"tenant-{i}"))
        while scheduler.running or scheduler.num_waiting:
            commit(scheduler, scheduler.plan())
    assert len(scheduler._served) < 100


def test_a_budget_below_the_running_limit_is_refused():
    with pytest.raises(ValueError, match="max_batch_tokens"):
        make(max_running=9)


def test_a_pool_gives_all_or_nothing():
    pool = BlockPool(3, BLOCK)
    assert pool.allocate(13) is None
    assert pool.num_free == 3
    assert len(pool.allocate(12)) == 3
    assert pool.allocate(1) is None


def test_a_source_takes_its_part_of_the_step_that_admits_it():
    pool = BlockPool(40, BLOCK)
    scheduler = Scheduler(pool, max_running=4, max_batch_tokens=20, prefix_cache=False)
    sources = [request(1, 2, num_source=n) for n in (7, 9, 19, 2)]
    for one in sources:
        scheduler.submit(one)
    steps = []
    while scheduler.running or scheduler.num_waiting:
        work = scheduler.plan()
        fresh = [item.request for item in work if not item.request.num_computed]
        assert sum(item.count for item in work) + sum(len(r.source_ids) for r in fresh) <= 20
        steps.append([sources.index(r) for r in fresh])
        commit(scheduler, work)
    # The third needs a step of its own; the last, which would have fitted before, waits its turn.
    assert [fresh for fresh in steps if fresh] == [[0, 1], [2], [3]]


def test_a_tenant_is_charged_for_its_sources():
    pool = BlockPool(200, BLOCK)
    scheduler = Scheduler(pool, max_running=1, max_batch_tokens=60, prefix_cache=False)
    served = []
    for _ in range(8):
        scheduler.submit(request(1, 1, "long", num_source=39))
        scheduler.submit(request(1, 1, "short", num_source=9))
    while scheduler.num_waiting:
        work = scheduler.plan()
        served += [item.request.tenant for item in work]
        commit(scheduler, work)
    assert served[:10].count("short") == 8


def test_of_a_tenant_the_lowest_priority_goes_first_and_of_equal_ones_who_came_first():
    scheduler = Scheduler(BlockPool(64, BLOCK), max_running=1, max_batch_tokens=8)
    requests = [request(2, 1, priority=priority) for priority in (0, 5, -1, 0, -1)]
    for one in requests:
        scheduler.submit(one)
    order = []
    while scheduler.num_waiting or scheduler.running:
        order += commit(scheduler, scheduler.plan())
    assert order == [requests[i] for i in (2, 4, 0, 3, 1)]


def test_a_priority_moves_nothing_between_tenants():
    def order_with(priority):
        scheduler = Scheduler(BlockPool(64, BLOCK), max_running=1, max_batch_tokens=8)
        for number in range(3):
            for tenant in "ab":
                scheduler.submit(request(3, number + 1, tenant, priority=priority[tenant]))
        tenants = []
        while scheduler.num_waiting or scheduler.running:
            tenants += [r.tenant for r in commit(scheduler, scheduler.plan())]
        return tenants

    assert order_with({"a": 100, "b": -100}) == order_with({"a": 0, "b": 0})


def test_what_is_overdue_is_told_whether_it_waits_or_runs():
    scheduler = Scheduler(BlockPool(64, BLOCK), max_running=1, max_batch_tokens=8)
    runs, waits, has_time = (request(2, 3, deadline_s=deadline) for deadline in (5.0, 6.0, None))
    for one in (runs, waits, has_time):
        scheduler.submit(one)
    scheduler.plan()
    assert scheduler.running == [runs]
    assert scheduler.overdue(4.9) == []
    assert scheduler.overdue(5.0) == [runs]
    assert scheduler.overdue(7.0) == [runs, waits]


def test_followers_go_on_before_what_came_after_them_in_their_order():
    scheduler = Scheduler(BlockPool(64, BLOCK), max_running=1, max_batch_tokens=8)
    leader, other, *followers = (request(2, 1) for _ in range(4))
    leader.followers = followers
    scheduler.submit(leader)
    scheduler.submit(other)
    scheduler.plan()
    scheduler.fork(leader)
    assert leader.followers == []
    scheduler.remove(leader)
    order = []
    while scheduler.num_waiting or scheduler.running:
        order += commit(scheduler, scheduler.plan())
    assert order == [*followers, other]
