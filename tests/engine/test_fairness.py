"""Tenants share the engine by tokens: nobody is delayed by another's flood or saved-up credit."""

from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.request import Request, SamplingParams
from redmux_server.engine.scheduler import Scheduler


def request(tenant, num_prompt=4, max_tokens=4):
    return Request(
        prompt_ids=[1] * num_prompt, max_tokens=max_tokens, sampling=SamplingParams(),
        stop_token_ids=frozenset(), tenant=tenant, adapter=None, logprobs=False,
        sink=lambda event: None,
    )  # fmt: skip


def scheduler(max_running=1, max_batch_tokens=16, prefix_cache=False):
    return Scheduler(
        BlockPool(200, 4), max_running=max_running, max_batch_tokens=max_batch_tokens,
        prefix_cache=prefix_cache,
    )  # fmt: skip


def step(engine):
    """Plans and commits one step as the engine does; returns the tenants admitted in it."""
    before = list(engine.running)
    work = engine.plan()
    admitted = [r.tenant for r in engine.running if r not in before]
    for item in work:
        samples = item.samples
        item.request.num_computed += item.count
        if samples:
            item.request.token_ids.append(1)
            if item.request.finish_reason() is not None:
                engine.remove(item.request)
    return admitted


def finish(engine):
    while engine.running or engine.num_waiting:
        step(engine)


def admissions(engine, count):
    """The tenants of the next `count` admissions, in order."""
    order = []
    while len(order) < count:
        order += step(engine)
    return order[:count]


def test_one_step_shares_its_admissions_between_tenants():
    engine = scheduler(max_running=4, max_batch_tokens=64)
    for tenant in ["flood"] * 10 + ["a", "b"]:
        engine.submit(request(tenant))
    assert sorted(step(engine)) == ["a", "b", "flood", "flood"]


def test_tenants_get_the_same_tokens_whatever_the_size_of_their_requests():
    engine = scheduler(max_running=1)
    for _ in range(60):
        engine.submit(request("small", 2, 2))
        engine.submit(request("large", 8, 7))
    order = admissions(engine, 60)
    # A small request costs 3 tokens, a large one 14: the newest token is never computed.
    assert abs(3 * order.count("small") - 14 * order.count("large")) <= 14


def test_a_tenant_is_not_charged_for_what_it_finds_in_the_cache():
    engine = scheduler(prefix_cache=True)
    for _ in range(60):
        engine.submit(request("same prompt", 13, 2))  # the first computes 14 tokens, the others 2
        engine.submit(request("short prompt", 1, 2))  # 2 tokens
    order = admissions(engine, 60)
    assert 25 <= order.count("same prompt") <= 35


def test_what_a_tenant_used_of_an_idle_server_is_not_held_against_it():
    engine = scheduler()
    for _ in range(50):
        engine.submit(request("early"))
    finish(engine)
    for _ in range(50):
        engine.submit(request("newcomer"))
    step(engine)
    engine.submit(request("early"))
    assert "early" in admissions(engine, 2)


def test_a_newcomer_starts_level_with_those_who_wait():
    engine = scheduler()
    for _ in range(50):
        engine.submit(request("busy"))
    admissions(engine, 20)
    for _ in range(50):
        engine.submit(request("newcomer"))
    order = admissions(engine, 20)
    assert 9 <= order.count("newcomer") <= 11


def test_a_tenant_that_only_runs_saves_no_credit():
    engine = scheduler(max_running=2)
    engine.submit(request("steady", 1, 400))
    for _ in range(300):
        engine.submit(request("busy", 10, 2))
    admissions(engine, 40)
    for _ in range(50):
        engine.submit(request("steady", 10, 2))
    order = admissions(engine, 20)
    assert 8 <= order.count("steady") <= 11


def test_requests_of_a_tenant_are_admitted_in_order():
    engine = scheduler()
    mine = [request("a") for _ in range(8)]
    for r in mine:
        engine.submit(r)
        engine.submit(request("b"))
    seen = []
    while len(seen) < 8:
        step(engine)
        seen += [r for r in mine if r.num_computed and r not in seen]
    assert seen == mine


def test_ending_a_waiting_request_lets_the_next_of_its_tenant_go():
    engine = scheduler()
    engine.submit(request("a"))
    step(engine)
    first, second = request("b"), request("b")
    engine.submit(first)
    engine.submit(second)
    engine.remove(first)
    finish(engine)
    assert (first.num_computed, second.num_output) == (0, 4)
