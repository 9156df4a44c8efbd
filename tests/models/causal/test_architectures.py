"""The parity matrix: families x sites x orders x cuttings of prompts, against the naive way.

The engine is stepped by hand, so that who computes what in which step is the test's choice. Every
family is loaded once. The default suite takes pairs: each value of one dimension meets each value
of every other one; the slow suite takes all combinations, and more families.
"""

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import torch
from conftest import Base, save_tiny_model
from engine.fake_engine import Caller
from models.causal.architectures import FAMILIES, MORE_FAMILIES, REFUSED
from reference import generate

from redmux.errors import FailedPreconditionError
from redmux_adapters import editable_sites, fingerprint, load_base, red_sites, with_layer_norms
from redmux_adapters.bases.architectures import is_known
from redmux_server.config import ServerConfig
from redmux_server.device import choose
from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.engine import Engine
from redmux_server.engine.request import Token
from redmux_server.engine.scheduler import Scheduler
from redmux_server.metrics import Metrics
from redmux_server.models.causal.attention import discover
from redmux_server.models.load_causal import load_causal

SITE_SETS = ("ffn", "attn", "ffn_attn", "more", "res", "ln")
ORDERS = ("alone", "mixed", "reversed", "joined")
BUDGETS = (5, 21, 256)  # tokens of a step: what prompts are cut into
NUM_TOKENS = 5
MAX_RUNNING = 4
# Lengths of one token, of less and more than a window of 9, and past a block of 32.
PROMPTS = [[17], [5, 250, 31, 7, 7], list(range(60, 73)), [(7 * i) % 250 + 3 for i in range(41)]]


def pairing():
    """(family, site set, order, budget) so that all pairs of values occur."""
    return [
        (family, SITE_SETS[j], ORDERS[(i + j) % 4], BUDGETS[(i + 2 * j) % 3])
        for i, family in enumerate(FAMILIES)
        for j in range(len(SITE_SETS))
    ]


def test_the_pairing_has_every_pair():
    dimensions = (FAMILIES, SITE_SETS, ORDERS, BUDGETS)
    for a, b in itertools.combinations(range(4), 2):
        pairs = {(case[a], case[b]) for case in pairing()}
        assert pairs == set(itertools.product(dimensions[a], dimensions[b]))


def test_the_documented_families_are_those_of_the_tests():
    text = (Path(__file__).parents[3] / "docs" / "parity.md").read_text()
    rows = [line.split("|") for line in text.partition("\n## Refused")[0].splitlines()]
    names = [re.findall(r"`(\w+)`", row[i]) for row in rows if len(row) == 4 for i in (1, 2)]
    assert sorted(itertools.chain(*names[::2])) == sorted(FAMILIES)
    assert sorted(itertools.chain(*names[1::2])) == sorted(MORE_FAMILIES)


class Served:
    """A family's model, loaded as a server loads it, beside its plain self."""

    def __init__(self, name, family, folder, max_context=128):
        from transformers import AutoConfig

        config = AutoConfig.for_model(name, **family.options)
        save_tiny_model(folder, config)
        model, tokenizer = load_base(str(folder))
        self.base = Base(folder, model, tokenizer, fingerprint(model), editable_sites(model))
        self.family = family
        # One thread: models as small as these only wait for a second one.
        server = ServerConfig(
            model=str(folder), kv_cache_tokens=512, max_context=max_context, threads=1
        )
        self.loaded = load_causal(server, choose(server))
        self._expected = {}

    def adapter(self, site_set, seed):
        if site_set == "res" and is_known(self.base.model.config.model_type):
            sites = red_sites(self.base.model, "res")
            return dataclasses.replace(self.base, ffn=sites).adapter(seed)
        ends = tuple(f".{end}" for end in self.family.site_set(site_set))
        sites = {path: dim for path, dim in self.base.ffn.items() if path.endswith(ends)}
        assert {end for end in ends if any(path.endswith(end) for path in sites)} == set(ends)
        if site_set == "ln":
            sites = with_layer_norms(sites)
        return dataclasses.replace(self.base, ffn=sites).adapter(seed)

    def expected(self, prompt, adapter):
        """Tokens and log-probabilities by plain transformers with the edit by hand."""
        key = tuple(prompt), adapter and adapter.digest
        if key not in self._expected:
            edits = adapter and adapter.edits
            self._expected[key] = generate(self.base.model, prompt, NUM_TOKENS, edits)
        return self._expected[key]


class Steps:
    """An engine of its own over a loaded model, stepped by hand."""

    def __init__(self, loaded, budget):
        pool = BlockPool(loaded.num_blocks, loaded.block_size)
        scheduler = Scheduler(pool, max_running=MAX_RUNNING, max_batch_tokens=budget)
        self.engine = Engine(loaded.runner, scheduler, loaded.bank, Metrics(), max_open=8)

    def step(self):
        self.engine._take_inbox(block=False)
        self.engine.step()
        self.engine._deliver(self.engine._stepper.take_events())

    def finish(self):
        while self.engine.num_open:
            self.step()

    def run(self, callers, order):
        match order:
            case "alone":
                for caller in callers:
                    self.engine.submit(caller.request)
                    self.finish()
            case "mixed" | "reversed":
                for caller in callers if order == "mixed" else callers[::-1]:
                    self.engine.submit(caller.request)
            case (
                "joined"
            ):  # each while the ones before it are in the middle of their prompt or text
                for caller in callers:
                    self.engine.submit(caller.request)
                    self.step()
                    self.step()
        self.finish()


def check(served, site_set, order, budget):
    """Base model and adapters of this and of another set of sites, one request each."""
    adapters = [
        served.adapter(site_set, 1), None, served.adapter("more", 2), served.adapter(site_set, 3)
    ]  # fmt: skip
    callers = [
        Caller(prompt, NUM_TOKENS, adapter=adapter, logprobs=True)
        for prompt, adapter in zip(PROMPTS, adapters, strict=True)
    ]
    Steps(served.loaded, budget).run(callers, order)
    for prompt, adapter, caller in zip(PROMPTS, adapters, callers, strict=True):
        compare(served, prompt, adapter, caller)


def compare(served, prompt, adapter, caller):
    tokens, logprobs = served.expected(prompt, adapter)
    assert caller.tokens == tokens
    got = [event.logprob for event in caller.events if isinstance(event, Token)]
    assert got == pytest.approx(logprobs, abs=5e-4)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_s_tokens_equal_the_reference_in_every_pair(name, tmp_path):
    served = Served(name, FAMILIES[name], tmp_path)
    for family, *case in pairing():
        if family == name:
            check(served, *case)


WIDER = {"sliding_window": 100, "max_position_embeddings": 256}
FAR = [(11 * i) % 250 + 3 for i in range(140)]


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "cohere2"])
def test_a_window_that_is_wider_than_the_prompts_of_the_start_up_check_is_kept_to(tmp_path, name):
    family = dataclasses.replace(FAMILIES[name], options=FAMILIES[name].options | WIDER)
    served = Served(name, family, tmp_path, max_context=160)
    windows = {rule.window for rule in discover(load_base(str(tmp_path))[0])[1]}
    assert 100 in windows
    adapter = served.adapter("ffn", 1)
    for budget in BUDGETS[1:]:
        prompts = [FAR, FAR[:99]]
        callers = [Caller(p, NUM_TOKENS, adapter=adapter, logprobs=True) for p in prompts]
        Steps(served.loaded, budget).run(callers, "mixed")
        for prompt, caller in zip(prompts, callers, strict=True):
            compare(served, prompt, adapter, caller)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FAMILIES | MORE_FAMILIES)
def test_a_family_s_tokens_equal_the_reference_in_every_combination(name, tmp_path):
    served = Served(name, (FAMILIES | MORE_FAMILIES)[name], tmp_path)
    for case in itertools.product(SITE_SETS, ORDERS, BUDGETS):
        check(served, *case)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_served_rightly_is_refused_with_the_reason(name, tmp_path):
    from transformers import AutoConfig

    options, reason = REFUSED[name]
    folder = save_tiny_model(tmp_path, AutoConfig.for_model(name, **options))
    server = ServerConfig(model=str(folder), kv_cache_tokens=512, threads=1)
    with pytest.raises(FailedPreconditionError, match=re.escape(reason)):
        load_causal(server, choose(server))


async def test_a_server_that_refuses_its_model_does_not_start(start_server, tmp_path):
    from transformers import AutoConfig

    options, _ = REFUSED["falcon"]
    folder = save_tiny_model(tmp_path, AutoConfig.for_model("falcon", **options))
    with pytest.raises(FailedPreconditionError, match=r"'falcon' cannot be served.*attention"):
        await start_server(model=str(folder))
