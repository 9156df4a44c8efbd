"""Request: one generation, scoring or reading, from its acceptance to its one end."""

import enum
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from redmux.errors import RedmuxError

if TYPE_CHECKING:  # they would bring torch into the scheduler
    from torch import Tensor

    from redmux_adapters import Adapter
    from redmux_server.engine.draft_state import DraftState
    from redmux_server.engine.grammar import Matcher
    from redmux_server.engine.logit_edits import EditState


class FinishReason(enum.Enum):
    """Why a generation ended by itself."""

    STOP = "stop"
    LENGTH = "length"
    SCORED = "scored"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is drawn; each default does nothing, and temperature 0 is greedy.

    What each of them means, and in which order they act, is said in docs/sampling.md.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] = ()  # none allows every one
    bad_token_ids: Sequence[int] = ()
    bad_sequences: Sequence[Sequence[int]] = ()  # of two tokens and more
    min_tokens: int = 0
    penalises: bool = field(init=False)  # tokens that were there
    edits_logits: bool = field(init=False)
    restricts: bool = field(init=False)  # which tokens may be drawn

    def __post_init__(self) -> None:
        penalises = self.repetition_penalty != 1 or bool(
            self.presence_penalty or self.frequency_penalty
        )
        object.__setattr__(self, "penalises", penalises)
        bans = (self.no_repeat_ngram, self.bad_token_ids, self.bad_sequences, self.min_tokens)
        edits = (penalises, self.logit_bias, self.allowed_token_ids, *bans)
        object.__setattr__(self, "edits_logits", any(map(bool, edits)))
        restricts = self.top_k or self.top_p < 1 or self.min_p or self.typical_p < 1
        object.__setattr__(self, "restricts", bool(restricts))


class Pooling(enum.Enum):
    """Which hidden states of a prompt become its one vector."""

    MEAN = "mean"
    CLS = "cls"  # the first token
    LAST = "last"


@dataclass(frozen=True, slots=True)
class Reading:
    """What is read off the hidden states of a prompt, where nothing is generated.

    `pooling` None is what the head of the request's adapter makes of them: its logits.
    """

    pooling: Pooling | None
    normalize: bool = False  # scale the vector to length 1
    type_ids: Sequence[int] | None = None  # one per token where a prompt has two parts


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; `logprob` is None unless it was asked for.

    `top` are the likeliest tokens there, as many as were asked for: (token id, logprob).
    """

    token_id: int
    logprob: float | None
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """The next of a request's targets: log-probabilities, and which are the likeliest token.

    `top` has of each the likeliest tokens at its place, as many as were asked for.
    """

    logprobs: list[float]
    is_greedy: list[bool]
    top: list[list[tuple[int, float]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Finished:
    """The request ended by itself."""

    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Read:
    """The request ended with what was to be read: a vector, or the logits of a head."""

    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended with an error; a cancelled one with RequestCancelledError."""

    error: RedmuxError


Event = Token | Scored | Finished | Read | Failed


@dataclass(eq=False, slots=True, weakref_slot=True)
class Request:
    """What crosses the borders between service, scheduler and engine.

    The service creates it and reads its events; after submission everything below the line is
    owned by the engine thread, except `early_end`, which the event loop sets.
    """

    prompt_ids: list[int]
    max_tokens: int
    sampling: SamplingParams
    stop_token_ids: frozenset[int]
    tenant: str  # whom the scheduler charges
    adapter: "Adapter | None"  # pinned: replacing or deleting its name changes nothing here
    logprobs: bool
    sink: Callable[[Event], None]  # called on the event loop, in order; its last ends the request
    # Tokens to score. Where something is generated they are the prompt's last ones. Else, with
    # `max_tokens` 0, the last of them follows the whole prompt, and each of the others is the
    # prompt's token behind the one that it follows.
    targets: Sequence[int] = ()
    reading: Reading | None = None  # what to read instead; `max_tokens` is 0 then, too
    # What the encoder of an encoder-decoder model reads; the prompt is its decoder's start then.
    source_ids: Sequence[int] = ()
    matcher: "Matcher | None" = None  # its own one, of the grammar that its output has to follow
    num_top: int = 0  # likeliest tokens to tell of at each generated one, if `logprobs`
    num_target_top: int = 0  # the same at each target
    priority: int = 0  # inside the tenant: lower is sooner
    deadline_s: float | None = None  # of time.monotonic(); it ends then, or never starts
    edited: range = range(sys.maxsize)  # positions that the adapter edits
    owner: str = ""  # whose cached prompts it shares; not the tenant where nobody has a key
    # Other choices of the same prompt, which begin with the first token of this one: each draws
    # its own from the same row of logits.
    followers: list["Request"] = field(default_factory=list)
    # ---------------------------------------------------------------------------------------
    early_end: Finished | Failed | None = None  # how its reader has ended it
    token_ids: list[int] = field(default_factory=list)  # prompt and output
    num_computed: int = 0  # tokens whose keys and values are in the cache
    num_cached: int = 0  # those of them that were there when the request was admitted
    num_paid: int = 0  # tokens that its tenant is not charged for again: they were lost to another
    # Of the cache, in order of position. Others come by assignment only, so whoever has kept what
    # was here sees whether it still is.
    blocks: Sequence[int] = ()
    block_keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as known
    slot: int | None = None  # row of the adapter bank while running
    states: list["Tensor"] = field(default_factory=list)  # of a reading, [tokens, hidden] a step
    edit_state: "EditState | None" = None  # of the options that change its logits
    draft_state: "DraftState | None" = None  # of what may come next
    kept: object = None  # what the runner keeps of it beside the cache, while it runs

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def max_length(self) -> int:
        """Most tokens the request can ever hold: source, prompt and output."""
        return len(self.source_ids) + len(self.prompt_ids) + self.max_tokens

    @property
    def num_placed(self) -> int:
        """Tokens for which it holds place in the cache while it runs.

        That is all there are so far; with a source all there can be, because what is kept of such
        a request is made in one piece.
        """
        return self.max_length if self.source_ids else len(self.token_ids)

    @property
    def draws(self) -> bool:
        """Whether tokens are generated."""
        return self.max_tokens > 0

    @property
    def is_scoring(self) -> bool:
        """Whether targets are left to score."""
        return bool(self.targets) and not self.num_output

    @property
    def gives_way(self) -> bool:
        """Whether it may lose its place to a request of another tenant."""
        return self.draws and not self.is_scoring

    @property
    def first_wanted(self) -> int:
        """Position of the first token whose logits are wanted."""
        num_wanted = len(self.targets) + self.draws if self.is_scoring else 1
        return len(self.token_ids) - num_wanted

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest token is left to compute."""
        return self.num_computed == len(self.token_ids) - 1 and self.num_output > 0

    def finish_reason(self) -> FinishReason | None:
        """Returns why the request is complete after its newest token, or None if it is not."""
        if self.token_ids[-1] in self.stop_token_ids:
            return FinishReason.STOP
        if self.matcher is not None and self.matcher.is_complete:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_output >= self.max_tokens else None


@dataclass(frozen=True, slots=True)
class Work:
    """What one step does for one request: compute its next `count` tokens.

    The last of them may be a draft: tokens that were guessed to follow the newest one.
    """

    request: Request
    count: int
    draft: tuple[int, ...] = ()

    @property
    def token_ids(self) -> list[int]:
        """The tokens that are computed."""
        first = self.request.num_computed
        known = self.request.token_ids[first : first + self.num_known]
        return [*known, *self.draft]

    @property
    def num_known(self) -> int:
        """How many of these tokens the request has."""
        return self.count - len(self.draft)

    @property
    def may_draft(self) -> bool:
        """Whether tokens may be guessed behind these: one request draws here, and goes on."""
        r = self.request
        is_plain = not (r.followers or r.is_scoring or r.source_ids)
        return is_plain and r.draws and self.samples

    @property
    def wanted(self) -> range:
        """Which of these tokens' logits are wanted, counted from the first token of this work."""
        first = self.request.first_wanted - self.request.num_computed
        return range(max(0, first), self.count)

    @property
    def edited(self) -> range:
        """Which of these tokens the adapter edits, counted from the first token of this work."""
        r = self.request
        if r.adapter is None:
            return range(0)
        first, last = r.edited.start - r.num_computed, r.edited.stop - r.num_computed
        return range(min(max(0, first), self.count), min(max(0, last), self.count))

    @property
    def samples(self) -> bool:
        """Whether this work ends at the newest token, so that it draws or reads."""
        r = self.request
        is_whole = r.num_computed + self.num_known == len(r.token_ids)
        return is_whole and (r.draws or r.reading is not None)

    @property
    def scored(self) -> range:
        """Those of the wanted tokens whose logits score targets."""
        return (
            self.wanted[: len(self.wanted) - self.samples] if self.request.is_scoring else range(0)
        )
