"""Rows and blocks move to the tenant that has been served less: nobody waits for a flood to end."""

from collections import Counter

import pytest
from engine.fake_engine import Caller, make_adapter, make_parts
from engine.test_fairness import request, step
from engine.test_scheduler import commit
from hypothesis import given, settings
from hypothesis import strategies as st

from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.scheduler import Scheduler

BLOCK = 4
BUDGET = 16


def scheduler(num_blocks=400, max_running=4, prefix_cache=False):
    return Scheduler(
        BlockPool(num_blocks, BLOCK), max_running=max_running, max_batch_tokens=BUDGET,
        prefix_cache=prefix_cache,
    )  # fmt: skip


def steps_until_running(engine, wanted, limit):
    for count in range(limit + 1):
        if wanted.num_computed:
            return count
        step(engine)
    raise AssertionError("not admitted")


def finish(engine, limit=100_000):
    for _ in range(limit):
        if not engine.running and not engine.num_waiting:
            return
        step(engine)
    raise AssertionError("never done")


def test_a_newcomer_gets_a_row_of_a_tenant_that_holds_them_all():
    engine = scheduler()
    for _ in range(6):
        engine.submit(request("flood", 4, 300))
    for _ in range(10):
        step(engine)
    late = request("late", 4, 1)
    engine.submit(late)
    # Until the flood has had a step's tokens more, 4 at a time, and the step after.
    assert steps_until_running(engine, late, 20) <= BUDGET / 4 + 1


def test_a_newcomer_gets_blocks_of_a_tenant_that_holds_them_all():
    engine = scheduler(num_blocks=100, max_running=8)
    for _ in range(4):
        engine.submit(request("flood", 4, 120))  # 31 blocks each
    for _ in range(45):
        step(engine)
    assert len(engine.running) == 4
    late = request("late", 40, 100)  # 12 blocks to begin with, where all that are free may be used
    engine.submit(late)
    step(engine)
    assert late not in engine.running
    assert steps_until_running(engine, late, 20) <= BUDGET / 4 + 2
    assert engine.running[:3] == [r for r in engine.running if r.tenant == "flood"]


def test_rows_end_up_divided_evenly_between_two_floods():
    engine = scheduler()
    for tenant in ("first", "second"):
        for _ in range(6):
            engine.submit(request(tenant, 4, 300))
        for _ in range(100):
            step(engine)
    assert Counter(r.tenant for r in engine.running) == {"first": 2, "second": 2}


def test_a_tenant_that_is_alone_keeps_everything():
    engine = scheduler()
    for _ in range(8):
        engine.submit(request("alone", 4, 50))
    while engine.num_waiting:
        work = engine.plan()
        assert engine.sent_back == []
        assert len(work) == 4
        commit(engine, work)


def test_nobody_loses_the_only_row():
    engine = scheduler(max_running=2)
    for tenant in "abcd":
        engine.submit(request(tenant, 4, 100))
    while engine.running:
        step(engine)
        assert engine.sent_back == []


def test_whoever_has_computed_least_goes_back_and_comes_first_again():
    engine = scheduler(max_running=3)
    flood = [request("flood", 4, 60) for _ in range(4)]
    engine.submit(flood[0])
    for _ in range(5):
        step(engine)
    for one in flood[1:]:
        engine.submit(one)
    step(engine)
    late = request("late", 4, 2)
    engine.submit(late)
    steps_until_running(engine, late, 20)
    assert flood[0] in engine.running
    (gone,) = {flood[1], flood[2]} - set(engine.running)
    assert gone.num_output > 0
    while late in engine.running:
        step(engine)
    step(engine)
    assert gone in engine.running
    assert flood[3] not in engine.running


def test_what_was_sent_back_starts_behind_its_blocks_that_are_still_there():
    engine = scheduler(prefix_cache=True)
    flood = [request("flood", 8, 300) for _ in range(5)]
    for i, one in enumerate(flood):
        one.prompt_ids[:] = one.token_ids[:] = [i] * 8
        engine.submit(one)
    for _ in range(20):
        step(engine)
    late = request("late", 4, 1)
    engine.submit(late)
    steps_until_running(engine, late, 20)
    (gone,) = set(flood[:4]) - set(engine.running)
    length = len(gone.token_ids)
    step(engine)
    assert gone in engine.running
    assert gone.num_computed > length - BLOCK - 1
    assert gone.num_cached == 0  # of its prompt, when it came


def test_whoever_takes_a_place_pays_for_what_is_computed_again():
    engine = scheduler()
    for _ in range(6):
        engine.submit(request("flood", 4, 300))
    for _ in range(100):
        step(engine)
    waits = []
    for _ in range(5):
        late = request("late", 1, 1)
        engine.submit(late)
        engine.submit(request("late", 1, 1))  # so that it never stops waiting
        waits.append(steps_until_running(engine, late, 200))
    assert max(waits[1:]) > BUDGET


def test_what_is_computed_again_is_not_charged_again():
    engine = scheduler()
    flood = [request("flood", 4, 300) for _ in range(4)]
    for one in flood:
        engine.submit(one)
    for _ in range(50):
        step(engine)
    late = request("late", 4, 1)
    engine.submit(late)
    steps_until_running(engine, late, 20)
    (gone,) = set(flood) - set(engine.running)
    length, before = len(gone.token_ids), engine._served["flood"]
    engine.submit(request("late", 4, 1))  # so that counters go on
    num_steps = 0
    while gone.num_computed < length:
        step(engine)
        num_steps += 1
    assert engine._served["flood"] - before <= 4 * num_steps


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 6), st.integers(0, 60), st.integers(1, 40), st.integers(1, 30),
    st.lists(st.tuples(st.integers(1, 60), st.integers(20, 400)), min_size=1, max_size=40),
)  # fmt: skip
def test_no_flood_makes_a_newcomer_wait_for_its_end(
    max_running, num_before, num_prompt, max_tokens, flood
):
    """The newcomer's request fits into half of the cache beside the largest one of the flood."""
    engine = scheduler(num_blocks=160, max_running=max_running)
    for prompt, output in flood:
        engine.submit(request("flood", prompt, output))
    for _ in range(num_before):
        step(engine)
    late = request("late", num_prompt, max_tokens)
    engine.submit(late)
    # A prompt under way, of at most 60 tokens beside 5 decodes; then a step's tokens of a flood
    # that has two rows at least, or else leaves a row and half of the cache.
    limit = 60 // (BUDGET - max_running) + 1 + BUDGET // 2 + 2
    steps_until_running(engine, late, limit)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_nobody_who_comes_later_passes_a_tenant_that_waits(data):
    """However many new names come, and whatever was computed for the one that waits before."""
    engine = scheduler(max_running=data.draw(st.integers(1, 4)))
    ahead = {}  # tenant that waits and has nothing running -> who waited before it
    for number in range(data.draw(st.integers(1, 60))):
        tenant = data.draw(st.sampled_from(["a", "b", f"new-{number}"]))
        waiting = set(engine._waiting)
        if tenant not in waiting and all(r.tenant != tenant for r in engine.running):
            ahead[tenant] = waiting | {tenant}
        prompt, output = data.draw(st.tuples(st.integers(1, 30), st.integers(1, 30)))
        engine.submit(request(tenant, prompt, output))
        for _ in range(data.draw(st.integers(0, 3))):
            admitted = step(engine)
            for gone in engine.sent_back:  # they were there before, too
                for others in ahead.values():
                    others.add(gone.tenant)
            for i, newcomer in enumerate(admitted):
                ahead.pop(newcomer, None)
                for passed, others in ahead.items():
                    if passed not in admitted[:i]:
                        assert newcomer in others, f"{newcomer} passed {passed}"
    finish(engine)


def test_fresh_names_do_not_starve_one_that_was_served_before():
    engine = scheduler(max_running=2)
    names = iter(range(10**6))
    engine.submit(request("keeps waiting", 1, 400))
    for _ in range(20):
        engine.submit(request(f"new-{next(names)}", 2, 3))
    for _ in range(30):
        engine.submit(request("known", 10, 10))
    while any(r.tenant == "known" for r in engine.running) or "known" in engine._waiting:
        step(engine)
        if engine.num_waiting < 40:
            engine.submit(request(f"new-{next(names)}", 2, 3))
    known = request("known", 2, 3)
    engine.submit(known)
    num_waiting = engine.num_waiting
    num_admitted = 0
    while not known.num_computed:
        for _ in range(3):
            engine.submit(request(f"new-{next(names)}", 2, 3))
        num_admitted += len(step(engine))
    assert num_admitted <= num_waiting


def test_what_was_used_long_ago_is_held_against_nobody_for_long():
    engine = scheduler(max_running=1)
    engine.submit(request("heavy", 4, 2))
    for _ in range(3):
        engine.submit(request("light", 4, 400))
    engine._served["heavy"] = 10**9
    step(engine)
    assert engine._waiting.keys() == {"heavy", "light"}
    engine.submit(request("newcomer"))
    assert engine._served["newcomer"] <= engine._served["light"] + 4096


@pytest.mark.parametrize("prefix_cache", [False, True])
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_many_tenants_share_and_every_request_gets_all_its_tokens(prefix_cache, data):
    engine = scheduler(num_blocks=60, max_running=4, prefix_cache=prefix_cache)
    mine = []
    for _ in range(data.draw(st.integers(5, 40))):
        tenant = data.draw(st.sampled_from("aaaabcdefgh"))
        one = request(tenant, data.draw(st.integers(1, 50)), data.draw(st.integers(1, 60)))
        mine.append(one)
        engine.submit(one)
        for _ in range(data.draw(st.integers(0, 10))):
            step(engine)
    finish(engine)
    assert [r.num_output for r in mine] == [r.max_tokens for r in mine]
    assert engine._blocks.num_free == 60


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_request_that_was_sent_back_gets_the_tokens_that_it_would_have_got(prefix_cache):
    parts = make_parts(max_open=40, num_blocks=40, max_running=3, prefix_cache=prefix_cache)
    floods = [
        Caller([i, 1, 2], 40, tenant="flood", adapter=make_adapter(i % 2)) for i in range(4)
    ]  # fmt: skip
    for caller in floods:
        parts.engine.submit(caller.request)
    late = []
    for number in range(12):
        for _ in range(10):
            parts.step()
        late.append(Caller([number % 4], 2, tenant=f"late-{number}", adapter=make_adapter(3)))
        parts.engine.submit(late[-1].request)
    while parts.engine.num_open:
        parts.step()
    assert parts.metrics.registry.get_sample_value("redmux_requests_sent_back_total") >= 3
    for caller in floods:
        assert caller.tokens == [(2 + n) % 4 for n in range(1, 41)]
    for number, caller in enumerate(late):
        assert caller.tokens == [(number + n) % 4 for n in (1, 2)]
    assert parts.runner.misreads == []
    assert parts.is_idle


def test_a_generation_keeps_its_place_until_its_prompt_is_scored():
    engine = scheduler(max_running=2)
    holders = [request("flood", 100, 300) for _ in range(2)]
    for holder in holders:
        holder.targets = list(range(99))
        engine.submit(holder)
    for _ in range(8):  # the first is scored, and the second has begun
        step(engine)
    assert [holder.is_scoring for holder in holders] == [False, True]
    late = request("late", 4, 1)
    engine.submit(late)
    steps_until_running(engine, late, 20)
    assert holders[1] in engine.running  # which has less computed, so it would be the one to go
    assert holders[0] not in engine.running
