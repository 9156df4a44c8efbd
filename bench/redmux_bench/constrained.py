"""`redmux bench constrained`: what rows with a grammar cost the others of their batch."""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redmux_bench import report
from redmux_bench.lone_engine import LoneEngine
from redmux_bench.rounds import median_ratio
from redmux_bench.server_process import serve_flags
from redmux_bench.tables import print_table
from redmux_bench.workload import Planned, Workload
from redmux_server.config import load_config
from redmux_server.engine.grammar import Matcher
from redmux_server.fair_thread import FairThread
from redmux_server.services.grammar import Grammars
from redmux_server.services.spec import Grammar, GrammarKind

_ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "kind": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 1000},
    },
    "required": ["name", "kind", "count"],
    "additionalProperties": False,
}
_TEXT = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 3000}},
    "required": ["text"],
}
_ITEMS = {"type": "array", "minItems": 1000, "items": _ITEM}
# None of them is complete before the tokens are used up.
_GRAMMARS = {
    "objects": Grammar(GrammarKind.JSON_SCHEMA, json.dumps(_ITEMS)),
    "text": Grammar(GrammarKind.JSON_SCHEMA, json.dumps(_TEXT)),
    "regex": Grammar(GrammarKind.REGEX, "([A-Z][a-z]{2,20} ){900}"),
    "lark": Grammar(
        GrammarKind.LARK,
        'start: (line "\\n"){500,900}\n'
        'line: /[a-z]+/ "=" sum\n'
        'sum: term (("+" | "-") term)*\n'
        'term: /[0-9]+/ | "(" sum ")"\n',
    ),
}
_NONE = "none"


@dataclass(frozen=True, slots=True)
class _Turn:
    """One wave: its throughput, and the processor time per output token, over all threads."""

    tokens_per_s: float
    cpu_ms: float


def run(options: argparse.Namespace) -> int:
    """Measures an engine in this process, without a server."""
    config = load_config(serve_flags(options, options.concurrency))
    rows = asyncio.run(_measure(options, LoneEngine(config)))
    print_table(
        ("grammar", "rows with it", "tokens/s", "of none", "CPU ms/token"),
        [[value for value in row.values() if not isinstance(value, list)] for row in rows],
    )
    report.write_json(options, config.model, {"rows": rows})
    return 0


async def _measure(options: argparse.Namespace, lone: LoneEngine) -> list[dict[str, Any]]:
    """Returns a row for each grammar, medians over the rounds.

    In each round there is a wave for each, and one without any before and behind them. Ratios are
    within a round, to its first wave.
    """
    model = lone.model
    grammars = Grammars(model.codec, model.vocab_size, FairThread("grammars"))
    matchers = {name: await grammars.matcher(which, "") for name, which in _GRAMMARS.items()}
    kinds = {
        _NONE: [],
        **{name: [matcher] for name, matcher in matchers.items()},
        "all of these": [*matchers.values()],
        "none again": [],
    }
    workload = Workload(options.prompt_tokens, options.output_tokens, lone.vocab_size)
    turns: dict[str, list[_Turn]] = {kind: [] for kind in kinds}
    lone.engine.start()
    try:
        with report.progress(1 + options.rounds, "round") as bar:
            for index in range(1 + options.rounds):  # the first one warms up
                for i, (kind, which) in enumerate(kinds.items()):
                    # Prompts of its own, of which none is in the cache.
                    planned = workload.plan(options.concurrency, [], (options.seed, i, index))
                    turns[kind].append(await _turn(lone, planned, which))
                bar.update()
    finally:
        await lone.engine.stop()
    return [_row(kind, turns, options.concurrency // 2 if kinds[kind] else 0) for kind in kinds]


async def _turn(lone: LoneEngine, planned: Sequence[Planned], matchers: Sequence[Matcher]) -> _Turn:
    cpu_s, started_s = time.process_time(), time.perf_counter()
    num_tokens = await lone.run(planned, matchers)
    elapsed_s = time.perf_counter() - started_s
    return _Turn(num_tokens / elapsed_s, 1e3 * (time.process_time() - cpu_s) / num_tokens)


def _row(kind: str, turns: Mapping[str, Sequence[_Turn]], num_rows: int) -> dict[str, Any]:
    rates, of_none = ([turn.tokens_per_s for turn in turns[k][1:]] for k in (kind, _NONE))
    return {
        "grammar": kind,
        "constrained_rows": num_rows,
        "tokens_per_s": statistics.median(rates),
        "ratio": median_ratio(rates, of_none),
        "cpu_ms_per_token": statistics.median(turn.cpu_ms for turn in turns[kind][1:]),
        "rounds": rates,
    }
