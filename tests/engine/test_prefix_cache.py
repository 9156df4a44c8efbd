"""Blocks that requests share, against a memory that remembers what was written where."""

from types import SimpleNamespace

import pytest
from engine.test_scheduler import check_blocks, expected_blocks
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.prefix import PrefixIndex, extend_keys
from redmux_server.engine.request import Request, SamplingParams
from redmux_server.engine.scheduler import Scheduler

BLOCK = 4


def request(prompt, max_tokens=1, tenant="t", digest=None, edited=range(1000)):
    return Request(
        prompt_ids=list(prompt), max_tokens=max_tokens, sampling=SamplingParams(),
        stop_token_ids=frozenset(), tenant=tenant,
        adapter=None if digest is None else SimpleNamespace(digest=digest),
        logprobs=False, sink=lambda event: None, edited=edited, owner=tenant,
    )  # fmt: skip


def content(request, position):
    """Stands for the keys and values of a token: all that they depend on."""
    digest = request.adapter and request.adapter.digest
    tokens = enumerate(request.token_ids[: position + 1])
    return request.owner, tuple((t, digest if i in request.edited else None) for i, t in tokens)


class PrefixMachine(RuleBasedStateMachine):
    """Random traffic with common beginnings; requests end, leave and fail at any time."""

    @initialize(
        num_blocks=st.integers(5, 12), max_running=st.integers(1, 4), extra=st.integers(0, 12),
        max_idle=st.none() | st.integers(0, 4),
    )  # fmt: skip
    def start(self, num_blocks, max_running, extra, max_idle):
        self.pool = BlockPool(num_blocks, BLOCK, max_idle)
        self.max_idle = max_idle
        self.max_running = max_running
        self.budget = max_running + extra
        self.scheduler = Scheduler(self.pool, max_running=max_running, max_batch_tokens=self.budget)
        self.memory = {}  # (block, offset) -> content
        self.said = [(0,) * 9]  # token sequences that later prompts begin with
        self.open = []
        self.idle_since = {}  # block -> when its last user left
        self.clock = 0
        self.dropped = set()  # contents of blocks that were forgotten

    @property
    def shared(self):
        """block -> the content of its last token, for every block that can be found."""
        return {b: self.memory[b, BLOCK - 1] for b in range(self.pool.num_blocks)
                if b in self.pool._index}  # fmt: skip

    @rule(data=st.data(), tenant=st.sampled_from("ab"), digest=st.sampled_from([None, "x"]),
          max_tokens=st.integers(1, 6) | st.integers(10, 40),
          edited=st.just(range(1000)) | st.builds(range, st.integers(0, 9), st.integers(0, 20)),
          )  # fmt: skip
    def submit(self, data, tenant, digest, max_tokens, edited):
        said = data.draw(st.sampled_from(self.said))
        beginning = said[: data.draw(st.integers(0, len(said)))]
        more = data.draw(st.lists(st.integers(0, 1), min_size=not beginning, max_size=6))
        prompt = (*beginning, *more)[:14]
        most = self.pool.num_blocks * BLOCK - len(prompt)
        new = request(prompt, min(max_tokens, most), tenant, digest, edited)
        self.scheduler.submit(new)
        self.open.append(new)

    @rule()
    def step(self):
        before, idle = list(self.scheduler.running), dict(self.idle_since)
        work = self.scheduler.plan()
        assert bool(work) == bool(self.open)
        assert sum(w.count for w in work) <= self.budget
        self.check_admissions(before, idle, work)
        for item in work:
            self.compute(item.request, item.count)
        for item in work:
            self.commit(item)

    def check_admissions(self, before, idle, work):
        stayed = {id(r) for r in before} - {id(r) for r in self.scheduler.sent_back}
        for admitted in self.scheduler.running:
            if id(admitted) in stayed:
                continue
            found = admitted.num_computed
            assert found < len(admitted.token_ids)
            # One that was sent back behind its first token keeps what it found the first time.
            assert admitted.num_output or found == admitted.num_cached
            assert found % BLOCK == 0
            for position in range(found):  # that it reads its own, not only an equal key's
                where = admitted.blocks[position // BLOCK], position % BLOCK
                assert self.memory[where] == content(admitted, position)
        gone = self.scheduler.sent_back
        for block in self.twins(gone):
            idle.pop(block, None)
        evicted = [idle[b] for b in idle if b not in self.pool._index]
        kept = [idle[b] for b in idle if b in self.pool._idle]
        assert not evicted or not kept or max(evicted) < min(kept)
        running = self.scheduler.running
        check_blocks(self.scheduler, before)
        lacks_block = any(len(r.blocks) * BLOCK < len(r.token_ids) for r in running)
        is_full = len(running) == self.max_running or sum(w.count for w in work) == self.budget
        if self.scheduler.num_waiting and not (is_full or gone or lacks_block):
            heads = [queue.first for queue in self.scheduler._waiting.values()]
            promised = sum(expected_blocks(r) - len(r.blocks) for r in running)
            needed = max(map(expected_blocks, heads)) + promised
            assert needed > self.pool.num_free  # it would not fit without a cache either
        self.note_idle(gone)

    def twins(self, gone):
        """Blocks with the content of what was sent back: they were used at that moment."""
        keys = {key for one in gone for key in one.block_keys}
        return [b for b, key in self.pool._index._keys.items() if key in keys]

    def compute(self, running, count):
        others = {b for r in self.scheduler.running if r is not running for b in r.blocks}
        first = running.num_computed
        for position in range(first, first + count):
            block = running.blocks[position // BLOCK]
            assert block not in others  # one writer, and no reader but the writer
            assert block not in self.pool._index
            self.memory[block, position % BLOCK] = content(running, position)
        for position in range(first + count):
            where = running.blocks[position // BLOCK], position % BLOCK
            assert self.memory[where] == content(running, position)

    def commit(self, item):
        running, samples = item.request, item.samples
        running.num_computed += item.count
        if not samples:
            return
        running.token_ids.append((len(running.token_ids) * 7 // 3) % 2)
        if running.finish_reason() is not None:
            self.remove(running)
        elif running.num_output == 1:
            self.scheduler.share(running)
            self.note_idle()

    @precondition(lambda self: self.open)
    @rule(data=st.data(), is_sound=st.booleans())
    def leave(self, data, is_sound):
        self.remove(data.draw(st.sampled_from(self.open)), is_sound)

    def remove(self, gone, is_sound=True):
        if gone.num_output:
            self.said.append(tuple(gone.token_ids))
        blocks, before = gone.blocks, self.shared
        is_left = bool(blocks) and is_sound and gone.num_computed >= len(gone.prompt_ids)
        self.scheduler.remove(gone, is_sound=is_sound)
        self.open.remove(gone)
        if is_left:
            for block in self.pool.find(gone.block_keys):  # twins of its blocks were used now
                self.idle_since.pop(block, None)
        self.note_idle()
        self.dropped |= {before[b] for b in before.keys() - self.shared.keys()}
        used = {b for r in self.scheduler.running for b in r.blocks}
        if not is_sound:
            assert not any(b in self.pool._index for b in blocks if b not in used)
            assert all(b in self.pool._index for b in before if b in used)
        elif is_left:  # all that it computed can be found, or as much as may be kept
            usable = gone.num_computed // BLOCK
            found = len(self.pool.find(gone.block_keys))
            assert found == usable or min(usable, self.max_idle) <= found < usable
        assert not gone.blocks

    def note_idle(self, sent_back=()):
        used = self.twins(sent_back)
        for block in [b for b in self.idle_since if b not in self.pool._idle or b in used]:
            del self.idle_since[block]
        # Of blocks that became idle together, the longer beginning goes first.
        depth = {b: len(tokens) for b, (_, tokens) in self.shared.items()}
        fresh = [b for b in self.pool._idle if b not in self.idle_since]
        if len(sent_back) < 2:
            fresh.sort(key=lambda b: -depth[b])
        for block in fresh:
            self.clock += 1
            self.idle_since[block] = self.clock

    @invariant()
    def every_block_is_used_idle_or_free(self):
        used = {b for r in self.scheduler.running for b in r.blocks}
        parts = [*used, *self.pool._idle, *self.pool._free]
        assert sorted(parts) == list(range(self.pool.num_blocks))
        assert self.pool.num_free == self.pool.num_blocks - len(used)
        for block in range(self.pool.num_blocks):
            users = sum(block in r.blocks for r in self.scheduler.running)
            assert self.pool._num_users[block] == users
        for running in self.scheduler.running:
            least, most = running.num_computed, len(running.token_ids)
            assert -(-least // BLOCK) <= len(running.blocks) <= -(-most // BLOCK)
            assert len(set(running.blocks)) == len(running.blocks)

    @invariant()
    def no_more_blocks_are_idle_than_may_be(self):
        assert self.max_idle is None or len(self.pool._idle) <= self.max_idle

    @invariant()
    def what_can_be_found_begins_with_what_can_be_found(self):
        known = set(self.shared.values())
        assert len(known) == len(self.shared)  # no content twice
        for owner, tokens in known:
            beginnings = [(owner, tokens[:n]) for n in range(BLOCK, len(tokens), BLOCK)]
            assert known.issuperset(beginnings) or self.dropped.intersection(beginnings)

    def teardown(self):
        if hasattr(self, "open"):
            for _ in range(10_000):
                if not self.open:
                    break
                self.step()
            assert self.open == []
            assert self.pool.num_free == self.pool.num_blocks
            assert not any(self.pool._num_users)


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def make(num_blocks=100, max_idle=None, **options):
    limits = {"max_running": 4, "max_batch_tokens": 64}
    return Scheduler(BlockPool(num_blocks, BLOCK, max_idle), **limits | options)


def run(scheduler, *requests):
    """Runs requests to their ends as the engine does; each draws the token 9."""
    for new in requests:
        scheduler.submit(new)
    while scheduler.running or scheduler.num_waiting:
        for item in scheduler.plan():
            samples = item.samples
            item.request.num_computed += item.count
            if samples:
                item.request.token_ids.append(9)
                if item.request.finish_reason() is not None:
                    scheduler.remove(item.request)
                elif item.request.num_output == 1:
                    scheduler.share(item.request)
    return [r.num_cached for r in requests]


def test_a_prompt_starts_behind_the_full_blocks_that_it_has_in_common():
    scheduler = make()
    assert run(scheduler, request(range(10))) == [0]
    assert run(scheduler, request([*range(7), 99, 98, 97])) == [4]
    assert run(scheduler, request([*range(10), 99])) == [8]
    assert run(scheduler, request([99, *range(10)])) == [0]
    assert scheduler.num_cached_tokens == 12


def test_the_last_token_of_a_prompt_is_always_computed():
    scheduler = make()
    run(scheduler, request(range(8)))
    assert run(scheduler, request(range(8)), request(range(9))) == [4, 8]


def test_a_next_turn_starts_behind_the_answer_that_it_repeats():
    scheduler = make()
    first = request(range(3), max_tokens=10)  # its newest token is never computed
    run(scheduler, first)
    assert run(scheduler, request([*first.token_ids, 1, 2])) == [12]


def test_a_prompt_can_be_shared_while_its_request_still_decodes():
    scheduler = make()
    scheduler.submit(request(range(9), max_tokens=50))
    item, *_ = scheduler.plan()
    item.request.num_computed += item.count
    item.request.token_ids.append(9)
    scheduler.share(item.request)
    late = request(range(9))
    scheduler.submit(late)
    scheduler.plan()
    assert late.num_cached == 8
    assert late.blocks[:2] == item.request.blocks[:2]
    assert not set(late.blocks[2:]) & set(item.request.blocks)


def test_a_prompt_is_not_shared_before_its_first_token_is_drawn():
    scheduler = make(max_batch_tokens=8)
    scheduler.submit(request(range(20)))
    (item,) = scheduler.plan()
    item.request.num_computed += item.count
    scheduler.remove(item.request)  # cancelled
    assert run(scheduler, request(range(20))) == [0]


def test_a_block_that_is_only_begun_or_only_named_is_not_shared():
    scheduler = make(max_batch_tokens=7)
    begun = request(range(20))
    scheduler.submit(begun)
    (item,) = scheduler.plan()
    begun.num_computed += item.count
    scheduler.share(begun)
    assert len(begun.block_keys) == 5
    assert scheduler._blocks.find(begun.block_keys) == begun.blocks[:1]


@pytest.mark.parametrize("other", [{"tenant": "u"}, {"digest": "y"}, {"digest": None}], ids=str)
def test_another_tenant_or_adapter_finds_nothing(other):
    scheduler = make()
    run(scheduler, request(range(9), digest="x"))
    assert run(scheduler, request(range(9), **{"digest": "x"} | other)) == [0]
    assert run(scheduler, request(range(9), digest="x")) == [8]


def test_what_no_adapter_edits_is_shared_with_the_base_model_and_with_other_adapters():
    scheduler = make()
    run(scheduler, request(range(10)))
    late = {"digest": "x", "edited": range(9, 1000)}
    assert run(scheduler, request(range(10), **late)) == [8]
    assert run(scheduler, request(range(10), digest="y", edited=range(5, 1000))) == [4]
    assert run(scheduler, request([*range(8), *range(9)], **late)) == [8]
    assert run(scheduler, request(range(10), tenant="u", **late)) == [0]


@pytest.mark.parametrize("other", [range(4), range(3, 8), range(8), range(5, 8), range(4, 7)])
def test_a_block_is_not_shared_where_other_tokens_of_it_or_before_it_are_edited(other):
    scheduler = make()
    run(scheduler, request(range(9), digest="x", edited=range(4, 8)))
    found = run(scheduler, request(range(9), digest="x", edited=other))
    assert found == [0 if other.start < 4 else 4]
    assert run(scheduler, request(range(9), digest="x", edited=range(4, 20))) == [8]


def test_the_names_of_tenant_and_adapter_cannot_be_cut_differently():
    chains = [[], [], []]
    for keys, names in zip(chains, [("ab", "c"), ("a", "bc"), ("a', 'b", "c")], strict=True):
        extend_keys(keys, *names, range(9), range(4), BLOCK, 4)
    assert len({keys[0] for keys in chains}) == 3


def test_keys_grow_the_same_at_once_and_bit_by_bit():
    whole, parts = [], []
    extend_keys(whole, "t", "d", range(6, 17), range(19), BLOCK, 19)
    for stop in (3, 4, 9, 9, 19):
        extend_keys(parts, "t", "d", range(6, 17), range(19), BLOCK, stop)
    assert whole == parts
    assert len(set(whole)) == 4
    assert all(len(key) == 32 for key in whole)


def test_equal_blocks_computed_at_the_same_time_become_one():
    scheduler = make()
    twins = [request(range(9), max_tokens=4) for _ in range(2)]
    for twin in twins:
        scheduler.submit(twin)
    for item in scheduler.plan():
        item.request.num_computed += item.count
        item.request.token_ids.append(9)
        scheduler.share(item.request)
    assert [twin.num_cached for twin in twins] == [0, 0]
    assert twins[0].blocks[:2] == twins[1].blocks[:2]
    assert not set(twins[0].blocks[2:]) & set(twins[1].blocks[2:])
    assert scheduler._blocks.num_free == 100 - 4


def test_what_a_failed_request_used_alone_cannot_be_found_any_more():
    scheduler = make()
    run(scheduler, request(range(9)))
    bad = request(range(20), max_tokens=4)
    scheduler.submit(bad)
    scheduler.plan()
    assert bad.num_cached == 8
    scheduler.remove(bad, is_sound=False)
    assert run(scheduler, request(range(9))) == [0]
    assert scheduler._blocks.num_free == 100


def test_the_least_recently_used_prompt_makes_room_last_block_first():
    scheduler = make(num_blocks=8)
    a, b = [1] * 9, [2] * 9
    run(scheduler, request(a))
    run(scheduler, request(b))  # two blocks of each are kept, four were never kept
    run(scheduler, request(a))
    run(scheduler, request([3] * 17, max_tokens=3))  # takes the four and one of the kept
    assert run(scheduler, request(a)) == [8]
    assert run(scheduler, request(b)) == [4]


def test_of_too_many_idle_blocks_the_least_recently_used_are_forgotten():
    scheduler = make(max_idle=3)
    a, b = [1] * 9, [2] * 9
    run(scheduler, request(a))
    run(scheduler, request(b))
    assert run(scheduler, request(a)) == [4]  # its second block made room
    assert run(scheduler, request(b)) == [4]  # as did b's then
    assert scheduler._blocks.num_free == 100


def test_a_prompt_that_is_longer_than_what_may_be_kept_leaves_its_beginning():
    scheduler = make(max_idle=3)
    run(scheduler, request(range(30)))
    assert run(scheduler, request(range(30))) == [12]


def test_blocks_that_running_requests_share_do_not_count_as_idle():
    scheduler = make(max_idle=0)
    assert run(scheduler, request(range(9), max_tokens=9)) == [0]
    early, late = request(range(9), max_tokens=9), request(range(9))
    scheduler.submit(early)
    (item,) = scheduler.plan()
    item.request.num_computed += item.count
    item.request.token_ids.append(9)
    scheduler.share(early)
    assert run(scheduler, late) == [8]


def test_one_request_after_the_other_touches_few_blocks():
    """So memory, which is taken when a block is first used, stays bounded."""
    scheduler, touched = make(max_idle=3), set()
    for first in range(30):
        scheduler.submit(new := request([first] * 9))
        scheduler.plan()
        touched.update(new.blocks)
        run(scheduler)
    assert len(touched) <= 3 + 3


def test_a_full_cache_admits_what_an_empty_one_would():
    scheduler = make(num_blocks=8)
    for first in range(5):
        run(scheduler, request([first] * 25, max_tokens=7))
    assert len(scheduler._blocks._index) == 8 - 1  # the newest block was not full
    assert scheduler.kv_used_ratio == 0
    scheduler.submit(request([9] * 25, max_tokens=7))
    assert len(scheduler.plan()) == 1
    assert scheduler.kv_used_ratio == 7 / 8


def test_what_is_found_is_not_counted_as_room_for_the_rest():
    scheduler = make(num_blocks=4)
    run(scheduler, request(range(9)))  # two blocks are kept
    scheduler.submit(request([7] * 5, max_tokens=3, tenant="first"))
    scheduler.plan()  # uses the two that are free
    waiting = request(range(9), max_tokens=3)
    scheduler.submit(waiting)
    scheduler.plan()
    assert waiting not in scheduler.running
    assert not waiting.blocks


def test_without_a_prefix_cache_nothing_is_kept():
    scheduler = make(prefix_cache=False)
    run(scheduler, request(range(9)))
    assert run(scheduler, request(range(9))) == [0]
    assert len(scheduler._blocks._index) == 0


def test_a_block_that_is_released_twice_is_an_error():
    pool = BlockPool(2, BLOCK)
    blocks = pool.allocate(4)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)


def test_an_index_finds_only_an_unbroken_beginning():
    index = PrefixIndex()
    for block, key in enumerate([b"a", b"b", b"d"]):
        index.add(key, block)
    assert index.find([b"a", b"b", b"c", b"d"]) == [0, 1]
    index.drop(0)
    index.drop(0)
    assert index.find([b"a", b"b"]) == []
    assert (len(index), 0 in index, 1 in index) == (2, False, True)
