"""A real model's tokens and log-probabilities with drafts: every bit is that of plain steps."""

import pytest
from engine.fake_engine import Caller, FreeRows

from redmux_server.config import ServerConfig
from redmux_server.device import choose
from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.drafts import Drafts
from redmux_server.engine.engine import Engine
from redmux_server.engine.request import SamplingParams
from redmux_server.engine.scheduler import Scheduler
from redmux_server.metrics import Metrics
from redmux_server.models.load_causal import load_causal

BUDGET = 48


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    config = ServerConfig(model=str(tiny_folder), kv_cache_tokens=1024, threads=1)
    return load_causal(config, choose(config))


def answers(loaded, drafts, callers):
    """Runs them, each beginning in the middle of those before it."""
    scheduler = Scheduler(
        BlockPool(loaded.num_blocks, loaded.block_size), max_running=8, max_batch_tokens=BUDGET
    )
    metrics = Metrics()
    engine = Engine(loaded.runner, scheduler, loaded.bank, metrics, max_open=20, drafts=drafts)
    waiting = list(callers)
    while waiting or engine.num_open:
        if waiting:
            engine.submit(waiting.pop(0).request)
        for _ in range(2):
            engine._take_inbox(block=False)
            engine.step()
            engine._deliver(engine._stepper.take_events())
    return metrics.registry.get_sample_value("redmux_draft_tokens_accepted_total")


def callers(base):
    adapters = [None, base.adapter(1), base.adapter(2)]
    samplings = [
        SamplingParams(),
        SamplingParams(repetition_penalty=1.2),
        SamplingParams(temperature=0.3, seed=4),
        SamplingParams(temperature=1.0, seed=5, top_p=0.9, min_tokens=8),
    ]
    prompts = [[7, 8, 9] * 12, [*range(20, 90)], [5]]
    return [
        Caller(
            prompt, 24, adapter=adapters[(i + j) % 3], sampling=sampling, logprobs=True, num_top=2,
            stop_token_ids=frozenset({11}) if j == 3 else frozenset(),
        )
        for i, prompt in enumerate(prompts)
        for j, sampling in enumerate(samplings)
    ]  # fmt: skip


def test_every_bit_is_that_of_plain_steps(loaded, base):
    assert loaded.bit_identical
    plain = callers(base)
    assert answers(loaded, None, plain) == 0
    drafts = Drafts(BUDGET, FreeRows())
    for _ in range(2):  # the second time it knows the answers
        drafted = callers(base)
        num_accepted = answers(loaded, drafts, drafted)
        assert [one.events for one in drafted] == [one.events for one in plain]
        assert num_accepted > 0
    assert num_accepted > sum(len(one.tokens) for one in plain) // 2
