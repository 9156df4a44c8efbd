"""Requests get cache blocks as they grow: many run together, and everything still ends."""

import random
import time

import pytest
from engine.fake_engine import Caller, make_adapter, make_parts
from engine.test_engine_steps import run
from engine.test_scheduler import BLOCK, check_blocks, request

from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.giving_way import for_growth, for_turn
from redmux_server.engine.room import Room
from redmux_server.engine.scheduler import Scheduler


def make(num_blocks, max_running=8, max_batch_tokens=64, prefix_cache=False):
    return Scheduler(
        BlockPool(num_blocks, BLOCK), max_running=max_running, max_batch_tokens=max_batch_tokens,
        prefix_cache=prefix_cache,
    )  # fmt: skip


def step(engine, lengths=None):
    """Plans, checks and commits one step; an answer ends with its length in `lengths`, too."""
    before = list(engine.running)
    work = engine.plan()
    check_blocks(engine, before)
    assert len(engine.running) <= engine._max_running
    for item in work:
        one, samples = item.request, item.samples
        assert (one.num_computed + item.count) <= len(one.blocks) * engine._blocks.block_size
        one.num_computed += item.count
        if samples:
            take(engine, one, (lengths or {}).get(one, one.max_tokens))
        elif not one.draws and one.num_computed == len(one.prompt_ids):
            engine.remove(one)
    return work


def take(engine, one, length):
    """What the engine does with a token of a request and of those that follow it."""
    followers = one.followers
    if followers:
        engine.fork(one)
    for drawing in (one, *followers):
        drawing.token_ids.append(len(drawing.token_ids) % 3)
        if drawing.num_output >= min(length, drawing.max_tokens):
            engine.remove(drawing)
        elif drawing.num_output == 1:
            engine.share(drawing)


def finish(engine, lengths=None, limit=50_000):
    """Steps to the end of all; returns how many requests were sent back."""
    num_sent_back = 0
    for _ in range(limit):
        if not engine.running and not engine.num_waiting:
            assert engine._blocks.num_free == engine._blocks.num_blocks
            return num_sent_back
        assert step(engine, lengths)
        num_sent_back += len(engine.sent_back)
    raise AssertionError("never done")


def test_64_requests_without_max_tokens_run_together_when_their_answers_are_short():
    """The sizes are those of SmolLM2 by default: a context of 8192, a cache of six of them."""
    engine = Scheduler(BlockPool(1456, 32), max_running=64, max_batch_tokens=512)
    rng = random.Random(0)
    lengths = {request(200, 8192 - 200): rng.randint(20, 300) for _ in range(256)}
    for one in lengths:
        engine.submit(one)
    most = num_sent_back = 0
    while engine.num_waiting:
        step(engine, lengths)
        most = max(most, len(engine.running))
        num_sent_back += len(engine.sent_back)
    assert most == 64
    assert num_sent_back == 0
    finish(engine, lengths)


def test_answers_that_fill_the_context_run_as_many_at_once_as_fit():
    engine = make(num_blocks=100, max_running=8)
    longest = [request(4, 96) for _ in range(8)]  # 25 blocks each
    for one in longest:
        engine.submit(one)
    num_sent_back = finish(engine)
    assert 0 < num_sent_back <= 12
    assert [one.num_output for one in longest] == [96] * 8


def test_a_small_max_tokens_leaves_the_rest_of_the_cache_to_others():
    room = Room(BlockPool(100, BLOCK))
    assert room.expected(request(4, 1)) == 2
    assert room.expected(request(4, 400)) == 3
    longer = request(4, 400)
    longer.token_ids += [0] * 20
    assert room.expected(longer) == (4 + 20 + 20) / BLOCK
    assert room.expected(request(4, 400, num_source=8)) == 103  # made in one piece
    assert room.expected(request(9, 0, targets=[1])) == 3


def test_nothing_is_expected_to_get_longer_than_it_may():
    room = Room(BlockPool(100, BLOCK))
    for max_tokens in range(1, 40):
        one = request(7, max_tokens)
        for _ in range(max_tokens):
            assert room.expected(one) <= room._blocks.blocks_for(one.max_length)
            one.token_ids.append(0)


def running(tenant, num_blocks, is_decoding=True):
    one = request(num_blocks * BLOCK, 9, tenant)
    one.blocks = range(num_blocks)
    if is_decoding:
        one.num_computed = len(one.token_ids)
        one.token_ids.append(0)
    return one


def test_of_the_tenant_that_holds_most_the_youngest_goes_and_the_tenant_pays_itself():
    flood, small = [running("flood", n) for n in (2, 9, 2, 3)], running("small", 8)
    served = {"flood": 0, "small": 9}
    assert for_growth(small, [*flood, small], served) == (flood[3], "flood")
    assert for_growth(flood[0], [*flood, small], served) == (flood[3], "flood")
    assert for_growth(flood[3], [small, *flood], served) == (flood[3], "flood")


def test_of_tenants_that_hold_the_same_the_one_most_served_gives_way():
    each = [running(tenant, 3) for tenant in "abc"]
    assert for_growth(each[0], each, {"a": 5, "b": 2, "c": 1}) == (each[1], "b")


def test_the_oldest_and_prompts_under_way_keep_their_places_and_the_oldest_pays():
    oldest, other, prompt = running("a", 9), running("b", 2), running("a", 4, is_decoding=False)
    served = {"a": 0, "b": 0}
    assert for_growth(oldest, [oldest, prompt, other], served) == (other, "a")
    assert for_growth(oldest, [oldest, prompt], served) is None


def test_whose_turn_it_is_gets_what_others_were_to_grow_by_as_well():
    pool = BlockPool(100, BLOCK)
    flood = [request(4, 100, "flood") for _ in range(3)]
    for one in flood:
        one.token_ids += [0] * 20
        one.blocks = pool.allocate(24)  # 6 blocks, of 11 that it is expected to hold
    late = request(20, 100, "late")
    options = {"level": 0, "num_rows": 0}
    for num_missing, num_victims in ((1, 1), (11, 1), (12, 2), (23, 0)):  # one may stay
        victims = for_turn(
            late, flood, {"flood": 0, "late": 0}, Room(pool), num_blocks=num_missing, **options
        )
        assert victims == flood[::-1][:num_victims]


def test_the_oldest_takes_blocks_of_tenants_that_hold_less_and_pays_for_them():
    engine = make(num_blocks=20)
    oldest = request(12, 60, "large")  # 18 blocks
    engine.submit(oldest)
    while oldest.num_output < 20:
        step(engine)
    for tenant in ("a", "b"):  # they need their blocks in other steps than the oldest
        engine.submit(request(6, 30, tenant))
    num_taken = 0
    while oldest.num_output < 60:
        served, num_blocks = engine._served["large"], len(oldest.blocks)
        step(engine)
        assert all(gone.tenant in "ab" for gone in engine.sent_back)
        took = oldest.blocks and len(oldest.blocks) > num_blocks
        lost = sum(gone.num_paid for gone in engine.sent_back) if took else 0
        assert engine._served["large"] == served + 1 + lost
        num_taken += bool(lost)
    assert num_taken
    finish(engine)


def test_the_oldest_waits_while_all_others_are_prompts_that_are_scored():
    engine = make(num_blocks=10, max_running=2, max_batch_tokens=2)
    oldest = request(4, 36)
    engine.submit(oldest)
    while not oldest.num_output:
        step(engine)
    score = request(24, 0, "score", targets=[1] * 24)  # 24 steps, and all that is free by then
    engine.submit(score)
    counts = []
    while engine.running[-1] is score or not counts:
        work = step(engine)
        counts.append([item.count for item in work if item.request is oldest])
        assert engine.running[0] is oldest
        assert engine.sent_back == []
    assert counts[-1] == []  # no block was free
    finish(engine)
    assert oldest.num_output == 36


def test_whoever_lost_its_place_gets_further_each_time_that_it_runs():
    engine = make(num_blocks=40, max_running=6, max_batch_tokens=8)
    rng = random.Random(1)
    mine = [request(rng.randint(1, 40), 100) for _ in range(30)]
    for one in mine:
        engine.submit(one)
    outputs = dict.fromkeys(mine, 0)
    num_sent_back = 0
    while engine.running or engine.num_waiting:
        step(engine)
        for gone in engine.sent_back:
            assert gone.num_output > outputs[gone]
            outputs[gone] = gone.num_output
            num_sent_back += 1
    assert num_sent_back
    assert {one.num_output for one in mine} == {100}


def test_a_stream_of_small_requests_does_not_starve_one_that_grows():
    """Each small one is another tenant's, which holds less and so is never the first to go."""
    engine = make(num_blocks=24, max_running=6, prefix_cache=True)
    large = request(8, 80, "large")  # 22 blocks
    engine.submit(large)
    rng = random.Random(2)
    for number in range(3_000):
        if not large.blocks and large.num_output == 80:
            break
        engine.submit(request(rng.randint(4, 12), rng.randint(1, 30), f"small-{number % 40}"))
        step(engine)
    assert large.num_output == 80
    finish(engine)


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_with_a_cache_too_small_for_all_everything_ends(prefix_cache, seed):
    """Long answers, choices, scores and sources; some leave early."""
    rng = random.Random(seed)
    num_blocks = rng.randint(12, 40)
    engine = make(num_blocks, rng.randint(2, 8), 160, prefix_cache)
    lengths, num_sent_back = {}, 0

    def new(tenant):
        kind, num_prompt = rng.random(), rng.randint(1, 30)
        most = num_blocks * BLOCK - num_prompt
        if kind < 0.1:
            return request(num_prompt, 0, tenant, targets=[1] * num_prompt)
        if kind < 0.2 and not prefix_cache:
            return request(1, rng.randint(1, min(20, most)), tenant, num_source=num_prompt - 1)
        one = request(num_prompt, most if kind < 0.7 else rng.randint(1, most), tenant)
        if kind < 0.4:
            one.followers = [request(num_prompt, one.max_tokens, tenant) for _ in range(3)]
        return one

    for _ in range(150):
        one = new(rng.choice("aaab") + str(rng.randint(0, 1)))
        length = rng.choice([rng.randint(1, 10), rng.randint(20, 200)])
        lengths |= dict.fromkeys((one, *one.followers), length)
        engine.submit(one)
        for _ in range(rng.randint(0, 6)):
            step(engine, lengths)
            num_sent_back += len(engine.sent_back)
        if rng.random() < 0.1 and engine.running:
            gone = rng.choice(engine.running)
            for one in (gone, *gone.followers):
                del lengths[one]
            engine.remove(gone)
    num_sent_back += finish(engine, lengths)
    assert num_sent_back
    for one, length in lengths.items():
        assert one.num_output == min(length, one.max_tokens)
    assert not any(engine._blocks._num_users)


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_request_sent_back_for_lack_of_blocks_gets_the_tokens_that_it_would_have_got(
    prefix_cache,
):
    parts = make_parts(max_open=40, num_blocks=20, max_running=4, prefix_cache=prefix_cache)
    callers = [
        Caller([i % 4, 1, 2], 70, tenant=str(i % 3), adapter=make_adapter(i % 4)) for i in range(12)
    ]
    for caller in callers:
        parts.engine.submit(caller.request)
    run(parts, limit=3_000)
    assert parts.metrics.registry.get_sample_value("redmux_requests_sent_back_total") >= 3
    for caller in callers:
        assert caller.tokens == [(2 + n) % 4 for n in range(1, 71)]
    assert parts.runner.misreads == []
    assert parts.is_idle


def test_one_that_waits_for_its_place_again_is_told_how_far_it_came_by_its_deadline():
    parts = make_parts(max_open=40, num_blocks=20, max_running=4)
    callers = [Caller([i, 1, 2], 70) for i in range(4)]
    for caller in callers:
        parts.engine.submit(caller.request)
    while not parts.scheduler.sent_back:
        parts.step()
    (gone,) = [caller for caller in callers if caller.request in parts.scheduler.sent_back]
    gone.request.deadline_s = time.monotonic()
    parts.step()
    assert f"after {len(gone.tokens)} tokens" in str(gone.error)
