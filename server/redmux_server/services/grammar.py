"""Grammars: what a client asks a completion to look like, compiled and kept."""

import asyncio
import hashlib
import logging
import re
from collections import OrderedDict

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux_server.engine.grammar import Matcher, first_line
from redmux_server.fair_thread import FairThread
from redmux_server.models.text import TextCodec
from redmux_server.services.grammar_source import to_lark
from redmux_server.services.spec import Grammar, GrammarKind

logger = logging.getLogger(__name__)

MAX_KEPT = 128  # grammars; a usual one takes well below a megabyte

# Of one step: about 4 ms and, of all a row's steps, 40 MB at most, whatever the grammar is.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_items_in_row=5_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
# Where the grammar made of a schema or a regex has the fault says nothing to its author.
_PLACE = re.compile(
    r"^at \d+\(\d+\): (failed to compile JSON schema: |invalid regex .*\(in regex\): )?"
)


class Grammars:
    """Gives out matchers of grammars; belongs to the event loop.

    Compiling happens in a thread that is fair over tenants, without Python's lock. The grammars
    used last are kept per tenant, so that nobody learns from the time what others have asked.
    """

    def __init__(self, codec: TextCodec, vocab_size: int, compiling: FairThread) -> None:
        """`vocab_size` is the number of logits, which may be more than there are tokens.

        Reading the tokenizer takes about half a second, in which nothing else runs in Python.
        """
        self._tokenizer, self._reason = _read(codec, vocab_size)
        if self._reason:
            logger.info("no structured output: %s", self._reason)
        self._compiling = compiling
        self._kept: OrderedDict[bytes, Matcher] = OrderedDict()
        self._under_way: dict[bytes, asyncio.Task[Matcher]] = {}

    async def matcher(self, grammar: Grammar, tenant: str) -> Matcher:
        """Returns a matcher at the beginning of this grammar, to be copied for each completion.

        Raises InvalidArgumentError for what is no grammar or is not supported, with the first line
        of what llguidance says, and FailedPreconditionError if the model's tokenizer is not.
        """
        key = _key(grammar, tenant)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key not in self._under_way:
            task = asyncio.ensure_future(self._compile(key, grammar, tenant))
            self._under_way[key] = task
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._under_way[key])  # others may wait for it, too

    async def _compile(self, key: bytes, grammar: Grammar, tenant: str) -> Matcher:
        tokenizer = self._tokenizer
        try:
            if tokenizer is None:
                raise FailedPreconditionError(
                    f"structured output is not available with this model: {self._reason}"
                )
            matcher = await self._compiling.run(
                tenant, len(grammar.source), lambda: _compiled(grammar, tokenizer)
            )
        finally:
            del self._under_way[key]
        self._kept[key] = matcher
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return matcher


def _read(codec: TextCodec, vocab_size: int) -> tuple[LLTokenizer | None, str]:
    """Returns the tokenizer as llguidance has it, or None and the reason."""
    source = codec.tokenizer_json()
    if source is None:
        return None, "its tokenizer is none of the tokenizers library"
    if not codec.eos_token_ids:
        return None, "it has no end-of-text token"
    try:
        eos = sorted(codec.eos_token_ids)
        return LLTokenizer(source, n_vocab=vocab_size, eos_token=eos), ""
    except ValueError as err:
        return None, f"its tokenizer cannot be read: {first_line(str(err))}"


def _key(grammar: Grammar, tenant: str) -> bytes:
    digest = hashlib.sha256()
    for part in (tenant, grammar.kind.value, grammar.source):
        data = part.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def _compiled(grammar: Grammar, tokenizer: LLTokenizer) -> Matcher:
    source = LLMatcher.grammar_from_lark(to_lark(grammar))
    state = LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)
    if state.is_error():
        raise _refused(grammar.kind, state.get_error())
    # One step warms what copies share. Its mask may have a word more than there are tokens for.
    mask = np.frombuffer(state.compute_bitmask(), np.uint8)[: 4 * -(-tokenizer.vocab_size // 32)]
    if state.is_error():
        raise _refused(grammar.kind, state.get_error())
    return Matcher(state, mask)


def _refused(kind: GrammarKind, error: str) -> InvalidArgumentError:
    line = first_line(error)
    if line.startswith("NoExtension"):
        line = "no text satisfies it"
    if kind is not GrammarKind.LARK:
        line = _PLACE.sub("", line)
        if line.endswith("regex parse error:"):  # whose reason follows the regex
            reasons = [part for part in error.split("\n") if part.startswith("error: ")]
            line = first_line(reasons[0].removeprefix("error: ")) if reasons else line
    return InvalidArgumentError(f"{kind.value}: {line}")
