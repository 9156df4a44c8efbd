"""Several choices of one prompt, from the service down to steps of an engine without a model."""

import asyncio
import contextlib

import pytest
import torch
from engine.fake_engine import BLOCK, NAN, VOCAB, make_parts

from redmux.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from redmux_server.engine.request import FinishReason
from redmux_server.fair_thread import FairThread
from redmux_server.services.choice import choice_seed
from redmux_server.services.generation import GenerationService
from redmux_server.services.pinning import Pins
from redmux_server.services.spec import GenerationSpec
from redmux_server.services.validation import Validator

PROMPT = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]  # two blocks and two tokens


class Codec:
    """A letter for each token."""

    eos_token_ids = frozenset({7})

    def decoder(self, *, skip_special_tokens):
        return lambda ids: "".join("abcdefg"[i : i + 1] for i in ids)


class Flat:
    """A model whose rows say nothing but how many tokens are before them."""

    def __init__(self, parts):
        self.runner = parts.runner
        self.computed = []  # (request, position), each time that it is computed
        self.forward = parts.runner.forward
        parts.runner.forward = self

    def __call__(self, work):
        logits = self.forward(work)
        rows = iter(range(len(logits)))
        for item in work:
            first = item.request.num_computed
            self.computed += [(item.request, first + i) for i in range(item.count)]
            if item.samples:
                row = next(rows)
                if not logits[row].isnan().any():
                    generator = torch.Generator().manual_seed(len(item.request.token_ids))
                    logits[row] = torch.randn(VOCAB, generator=generator)
        return logits


@pytest.fixture
def parts():
    return make_parts(max_open=20, num_blocks=64)


@pytest.fixture
def service(parts):
    with contextlib.closing(FairThread("tokenizer")) as tokenizing:
        yield GenerationService(
            parts.engine, Pins(None), Codec(), Validator(VOCAB, 40), parts.metrics, tokenizing, None
        )


async def run(parts, generation):
    """Steps until every choice has its finish; returns (text, token ids, finish) of each."""
    texts, ids, finishes = {}, {}, {}

    async def read():
        async for delta in generation.deltas():
            texts[delta.index] = texts.get(delta.index, "") + delta.text
            ids.setdefault(delta.index, []).extend(delta.token_ids)
            if delta.finish:
                assert delta.index not in finishes
                finishes[delta.index] = delta.finish

    reading = asyncio.ensure_future(read())
    for _ in range(200):
        if reading.done():
            break
        parts.step()
        await asyncio.sleep(0)
    await reading
    return [(texts[i], ids[i], finishes[i]) for i in sorted(finishes)]


def spec(**options):
    return GenerationSpec(**{"prompt": PROMPT, "max_tokens": 6, "temperature": 3.0, "seed": 5}
                          | options)  # fmt: skip


async def test_each_choice_is_what_its_seed_gives_alone(parts, service):
    Flat(parts)
    generation, _ = await service.submit(spec(n=5), "")
    choices = await run(parts, generation)
    assert len(choices) == 5
    assert len({tuple(ids) for _, ids, _ in choices}) > 2
    for index, (text, ids, finish) in enumerate(choices):
        alone, _ = await service.submit(spec(seed=choice_seed(5, index)), "")
        ((alone_text, alone_ids, alone_finish),) = await run(parts, alone)
        assert (text, ids, finish.reason) == (alone_text, alone_ids, alone_finish.reason)
    assert parts.is_idle
    assert not parts.runner.misreads


async def test_the_first_choice_has_the_seed_of_the_request():
    assert choice_seed(5, 0) == 5
    assert len({choice_seed(5, i) for i in range(64)}) == 64


async def test_the_full_blocks_of_the_prompt_are_computed_once(parts, service):
    flat = Flat(parts)
    generation, _ = await service.submit(spec(n=5, ignore_eos=True), "")
    choices = await run(parts, generation)
    positions = [position for _, position in flat.computed if position < len(PROMPT)]
    full = len(PROMPT) // BLOCK * BLOCK
    assert sorted(p for p in positions if p < full) == list(range(full))
    assert all(positions.count(p) <= 5 for p in range(full, len(PROMPT)))
    assert [finish.num_prompt_tokens for *_, finish in choices] == [len(PROMPT)] * 5
    assert [finish.num_completion_tokens for *_, finish in choices] == [6] * 5


async def test_choices_of_one_token_compute_the_prompt_once(parts, service):
    flat = Flat(parts)
    generation, _ = await service.submit(spec(n=8, max_tokens=1), "")
    assert len(await run(parts, generation)) == 8
    assert sorted(position for _, position in flat.computed) == list(range(len(PROMPT)))
    assert parts.is_idle


async def test_choices_take_a_place_each_all_or_none(parts, service):
    generation, _ = await service.submit(spec(n=12), "")
    assert parts.engine.num_open == 12
    with pytest.raises(ResourceExhaustedError):
        await service.submit(spec(n=6), "")
    assert parts.engine.num_open == 12
    await run(parts, generation)
    assert parts.engine.num_open == 0


async def test_more_choices_than_there_can_be_places_for_are_refused_for_good(service):
    with pytest.raises(InvalidArgumentError, match="n is 18; this server has places for 17"):
        await service.submit(spec(n=18), "")


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
async def test_closing_the_reader_ends_every_choice(parts, service, num_steps):
    Flat(parts)
    generation, _ = await service.submit(spec(n=6), "")
    deltas = generation.deltas()
    if num_steps:
        waiting = asyncio.ensure_future(anext(deltas))
        for _ in range(num_steps):
            await asyncio.sleep(0)
            parts.step()
        waiting.cancel()
        await asyncio.wait([waiting])
        await deltas.aclose()
    else:
        generation.cancel()
    parts.step()
    parts.step()
    assert parts.engine.num_open == 0
    assert parts.is_idle


async def test_a_prompt_that_fails_ends_every_choice(parts, service):
    generation, _ = await service.submit(spec(prompt=[0, NAN], n=3), "")
    with pytest.raises(FailedPreconditionError, match="not finite"):
        await run(parts, generation)
    assert parts.engine.num_open == 0
    assert parts.is_idle


async def test_a_choice_that_ends_early_leaves_the_others(parts, service):
    Flat(parts)
    generation, _ = await service.submit(spec(n=5, max_tokens=12), "")
    choices = await run(parts, generation)
    lengths = {len(ids) for _, ids, _ in choices}
    assert len(lengths) > 1
    for _, ids, finish in choices:
        by_token = finish.reason is FinishReason.STOP
        assert by_token == (ids[-1] == 7)
        assert finish.stop_token_id == (7 if by_token else None)
        assert 0 <= finish.first_token_s <= finish.total_s


@pytest.mark.parametrize("n", [0, -1, 65])
async def test_a_number_of_choices_that_cannot_be_is_refused(service, n):
    with pytest.raises(InvalidArgumentError, match=f"n is {n}, must be from 1 to 64"):
        await service.submit(spec(n=n), "")


async def test_every_choice_tells_what_the_cache_had_of_the_prompt(parts, service):
    await run(parts, (await service.submit(spec(), ""))[0])
    choices = await run(parts, (await service.submit(spec(n=3), ""))[0])
    assert [finish.num_cached_tokens for *_, finish in choices] == [2 * BLOCK] * 3


async def test_a_stop_text_ends_nothing_before_min_tokens(parts, service):
    """Tokens are 2, 3, 0, 1, 2, 3 and so on: the text is "cdabcdab"."""
    options = {"temperature": 0.0, "max_tokens": 9, "stop": ["d"]}
    ((text, ids, finish),) = await run(parts, (await service.submit(spec(**options), ""))[0])
    assert (text, len(ids), finish.stop) == ("c", 2, "d")
    generation, _ = await service.submit(spec(min_tokens=2, **options), "")
    ((text, ids, finish),) = await run(parts, generation)
    assert (text, len(ids), finish.stop) == ("cdabc", 6, "d")


@pytest.mark.parametrize(("included", "expected"), [(False, "c"), (True, "cd")])
async def test_the_text_of_a_stop_token_is_there_if_wanted(parts, service, included, expected):
    generation, _ = await service.submit(
        spec(temperature=0.0, stop_token_ids=[3], include_stop_str=included), ""
    )
    ((text, ids, finish),) = await run(parts, generation)
    assert (text, ids, finish.stop_token_id) == (expected, [2, 3], 3)
