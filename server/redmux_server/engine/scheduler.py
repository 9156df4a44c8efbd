"""Scheduler: which tokens of which requests the next step computes. No torch in here."""

from collections.abc import Iterator

from redmux_server.engine import giving_way
from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.line import Line
from redmux_server.engine.prefix import extend_keys
from redmux_server.engine.request import Request, Work
from redmux_server.engine.room import Room

_MAX_LEAP = 4096  # tokens that whoever begins to wait may be behind the least served one


class Scheduler:
    """Continuous batching with chunked prefill, decodes first, fair over tenants.

    A running request holds cache blocks for the tokens that it has, and gets another one when it
    needs it. Admission leaves some for that (see Room); where there are none all the same, others
    are sent back, but never the oldest one, so nothing fails for lack of memory and everything
    ends. Admission picks the waiting tenant with the least service so far (virtual token
    counters, Sheng et al. 2024), and of its requests that of the lowest priority which came first.
    Owned by the engine thread.

    A tenant may hold every place and every block while nobody else wants them. Once the tenant
    whose turn it is finds none, and has been served a step's tokens less than those who hold them,
    it takes what it needs from whoever holds most, who keeps no fewer than it has then. What has
    lost its place goes back to the front of its tenant's queue and is computed again; whoever took
    the place pays for that.

    A request starts behind the full blocks of its prompt that an earlier one of the same tenant
    and the same adapter content has left in the cache. It is charged for what it computes only.

    The source of an encoder-decoder's request is computed as a whole in the step that admits it.
    """

    def __init__(
        self,
        blocks: BlockPool,
        *,
        max_running: int,
        max_batch_tokens: int,
        prefix_cache: bool = True,
        whole_prompts: bool = False,
    ) -> None:
        """`max_batch_tokens` bounds the tokens of one step, and so how long it takes.

        With `whole_prompts` no prompt is cut; each has to fit into a step then. A source has to
        fit beside a token of every running request.
        """
        if max_batch_tokens < max_running:
            raise ValueError("max_batch_tokens must be at least max_running: decodes go first")
        self._blocks = blocks
        self._room = Room(blocks)
        self._max_running = max_running
        self._max_batch_tokens = max_batch_tokens
        self._prefix_cache = prefix_cache
        self._whole_prompts = whole_prompts
        self.num_cached_tokens = 0  # found in the cache at admissions so far
        self.running: list[Request] = []
        self.sent_back: list[Request] = []  # those that the newest plan took the places of
        self._waiting: dict[str, Line] = {}
        self._served: dict[str, int] = {}  # tenant -> tokens computed for it

    @property
    def num_waiting(self) -> int:
        """Requests that are not admitted yet."""
        return sum(map(len, self._waiting.values()))

    @property
    def kv_used_ratio(self) -> float:
        """Share of the cache blocks that requests hold."""
        return 1 - self._blocks.num_free / self._blocks.num_blocks

    def submit(self, request: Request) -> None:
        """Queues a request behind the others of its tenant and priority.

        A tenant that begins to wait starts level with the most served of those that wait: what it
        did not ask for is not saved up, and however many new ones come, they line up behind those
        who are there. The leap bounds what they have to wait for, and what is held against it.
        """
        tenant = request.tenant
        if not self._waiting:  # nobody is owed anything
            self._served = {r.tenant: 0 for r in self.running} | {tenant: 0}
        elif tenant not in self._waiting:
            served = [self._served[t] for t in self._waiting]
            most = min(served) + _MAX_LEAP
            level = max(max(served), self._served.get(tenant, 0))
            self._served[tenant] = min(level, most)
        self._waiting.setdefault(tenant, Line()).append(request)

    def ended_early(self) -> list[Request]:
        """Returns every request that its reader has ended; `remove` takes them out."""
        return [r for r in self._all() if r.early_end is not None]

    def overdue(self, now_s: float) -> list[Request]:
        """Returns every request whose deadline has passed; `remove` takes them out."""
        return [r for r in self._all() if r.deadline_s is not None and r.deadline_s <= now_s]

    def _all(self) -> Iterator[Request]:
        yield from self.running
        for line in self._waiting.values():
            yield from line

    def fork(self, request: Request) -> None:
        """Queues the followers of a request in front of the others of its tenant and priority.

        Call it when their first tokens are drawn. They are admitted behind those of the prompt's
        blocks that `request` shares, and compute the rest of it and that token.
        """
        for follower in reversed(request.followers):
            follower.num_cached = request.num_cached
            self._waiting.setdefault(request.tenant, Line()).append_first(follower)
        request.followers = []

    def share(self, request: Request) -> None:
        """Lets later requests start behind the full blocks that this one has computed.

        Call it once the newest step has drawn a token for it. Nothing is ever written to a shared
        block: it is full, and a request writes behind what it has computed.
        """
        self._extend_keys(request, request.num_computed)
        num_full = request.num_computed // self._blocks.block_size
        keys = request.block_keys[:num_full]
        shared = map(self._blocks.share, request.blocks, keys)
        request.blocks = [*shared, *request.blocks[len(keys) :]]

    def remove(self, request: Request, *, is_sound: bool = True) -> None:
        """Forgets a request and gives its blocks back.

        Its full blocks stay for later requests, unless its computing went wrong.
        """
        if request in self.running:
            self._stop_running(request, is_sound=is_sound)
        else:
            self._waiting[request.tenant].remove(request)
            self._drop_empty(request.tenant)
        self._forget_idle_tenants()

    def _stop_running(self, request: Request, *, is_sound: bool = True) -> None:
        self.running.remove(request)
        if not is_sound:
            self._blocks.forget(request.blocks)
        elif request.num_computed >= len(request.prompt_ids):
            self.share(request)
        self._blocks.release(request.blocks)
        request.blocks = ()
        request.kept = None

    def lend_blocks(self, request: Request) -> bool:
        """Gives blocks to a request that was not submitted; returns whether there were enough."""
        request.blocks = self._blocks.allocate(request.max_length) or ()
        return bool(request.blocks)

    def take_back(self, request: Request) -> None:
        """Takes the blocks back that were lent to a request."""
        self._blocks.release(request.blocks)
        request.blocks = ()

    def plan(self) -> list[Work]:
        """Returns the work of the next step, decodes first, then prefills in order of admission.

        Admits waiting requests while the step's token budget, the running limit and the cache
        allow it. `sent_back` are those that others took the places of. Empty only if nothing can
        be done.
        """
        self.sent_back = []
        stuck = self._grow()
        # Nobody comes in the step in which somebody had to go.
        can_admit = bool(self._waiting) and stuck is None and not self.sent_back
        first = self._make_room() if can_admit else None
        work, prefilling = [], []
        for request in self.running:
            if not request.is_decoding:
                prefilling.append(request)
            elif request is not stuck:
                work.append(self._charge(request, 1))
        budget = self._max_batch_tokens - len(work)
        for request in prefilling:
            if budget:
                work.append(self._prefill(request, budget))
                budget -= work[-1].count
        while can_admit and budget and len(self.running) < self._max_running:
            admitted = self._admit(first or self._next(), budget) if self._waiting else None
            if admitted is None:
                break
            first = None
            budget -= self._encode(admitted)
            work.append(self._prefill(admitted, budget))
            budget -= work[-1].count
        return work

    def make_place(self, request: Request, num_tokens: int) -> int:
        """Returns for how many tokens of a draft a planned request has place, up to so many.

        It gets blocks for that where they are unused; `take_spare` takes them back.
        """
        size = self._blocks.block_size
        while (
            len(request.blocks) * size < len(request.token_ids) + num_tokens
            and self._blocks.num_unused
        ):
            request.blocks = [*request.blocks, *(self._blocks.allocate(1) or ())]
        return min(num_tokens, len(request.blocks) * size - len(request.token_ids))

    def accept(self, request: Request) -> None:
        """Counts the next token of a draft as computed and charges for it: it was drawn, too."""
        self._charge(request, 1)
        request.num_computed += 1

    def take_spare(self, request: Request) -> None:
        """Takes back the blocks behind a request's newest token, so that they are never missed."""
        num_needed = self._blocks.blocks_for(len(request.token_ids))
        if len(request.blocks) > num_needed:
            self._blocks.release(request.blocks[num_needed:])
            request.blocks = request.blocks[:num_needed]

    def _grow(self) -> Request | None:
        """Gives decoding requests the blocks that their newest tokens need, the oldest first.

        Where none is free, others are sent back. Returns the one for which there was none all the
        same: the oldest of all, whose turn it is once the prompts under way are computed. Every
        other one that lacks a block can itself give way.
        """
        size = self._blocks.block_size
        lacking = [r for r in self.running if len(r.blocks) * size < len(r.token_ids)]
        for request in lacking:
            while request.blocks:  # it has not been sent back itself
                block = self._blocks.allocate(1)
                if block is not None:
                    request.blocks = [*request.blocks, *block]
                    break
                way = giving_way.for_growth(request, self.running, self._served)
                if way is None:
                    return request
                self._send_back(*way)
        return None

    def _make_room(self) -> Request | None:
        """Sends running requests back whose places the next waiting one has to have.

        Returns it if there were any: they are its places then.
        """
        request = self._next()
        budget = self._max_batch_tokens
        budget -= sum(len(r.token_ids) - r.num_computed for r in self.running)
        if self._num_uncut(request) > budget:
            return None
        for victim in self._victims(request):
            self._send_back(victim, request.tenant)
        return request if self.sent_back else None

    def _victims(self, request: Request) -> list[Request]:
        level = self._served[request.tenant] + self._max_batch_tokens
        if all(self._served[r.tenant] < level for r in self.running):
            return []
        return giving_way.for_turn(
            request, self.running, self._served, self._room, level=level,
            num_rows=int(len(self.running) == self._max_running),
            num_blocks=self._room.num_missing(request, self._find_prefix(request), self.running),
        )  # fmt: skip

    def _send_back(self, victim: Request, payer: str) -> None:
        """Puts a running request in front of others of its priority, to be computed again.

        `payer` is charged for that, but for what stays in the cache.
        """
        victim.num_paid = max(victim.num_paid, victim.num_computed)
        num_lost = len(victim.source_ids) + victim.num_computed
        self._stop_running(victim)
        num_lost -= len(self._find_prefix(victim)) * self._blocks.block_size
        self._served[payer] += num_lost
        victim.num_computed = 0
        self._waiting.setdefault(victim.tenant, Line()).append_first(victim)
        self.sent_back.append(victim)

    def _encode(self, request: Request) -> int:
        """Charges for a source and returns its tokens."""
        if not request.num_paid:
            self._served[request.tenant] += len(request.source_ids)
        return len(request.source_ids)

    def _prefill(self, request: Request, budget: int) -> Work:
        return self._charge(request, min(budget, len(request.token_ids) - request.num_computed))

    def _charge(self, request: Request, count: int) -> Work:
        # At once: the next admission of the same step must see it.
        first = max(request.num_computed, request.num_paid)
        self._served[request.tenant] += max(0, request.num_computed + count - first)
        return Work(request, count)

    def _admit(self, request: Request, budget: int) -> Request | None:
        if self._num_uncut(request) > budget:
            return None
        found = self._find_prefix(request)
        if self._room.num_missing(request, found, self.running):
            return None  # wait for it rather than let smaller requests starve it
        blocks = self._blocks.allocate(request.num_placed, found)
        assert blocks is not None, "less is allocated than was free"
        self._waiting[request.tenant].remove(request)
        self._drop_empty(request.tenant)
        request.blocks = blocks
        request.num_computed = len(found) * self._blocks.block_size
        if not request.num_output:  # not sent back in between
            request.num_cached = request.num_computed
            self.num_cached_tokens += request.num_cached
        self.running.append(request)
        return request

    def _next(self) -> Request:
        """Returns the waiting request whose turn it is; of equal tenants, of who waits longer."""
        return self._waiting[min(self._waiting, key=self._served.__getitem__)].first

    def _num_uncut(self, request: Request) -> int:
        """Returns the tokens that the step which admits a request has to have place for."""
        num_prompt = len(request.prompt_ids) if self._whole_prompts else 1
        return len(request.source_ids) + num_prompt

    def _find_prefix(self, request: Request) -> list[int]:
        """Returns the cached blocks that a request begins with, up to where logits are wanted.

        Those tokens are always computed, the newest one at least; of a reading, all.
        """
        if request.reading is not None:
            return []
        self._extend_keys(request, len(request.token_ids))
        num_usable = request.first_wanted // self._blocks.block_size
        return self._blocks.find(request.block_keys[:num_usable])

    def _extend_keys(self, request: Request, num_tokens: int) -> None:
        if self._prefix_cache:
            extend_keys(
                request.block_keys,
                request.owner,
                "" if request.adapter is None else request.adapter.digest,
                request.edited,
                request.token_ids,
                self._blocks.block_size,
                num_tokens,
            )

    def _drop_empty(self, tenant: str) -> None:
        if not self._waiting[tenant]:
            del self._waiting[tenant]

    def _forget_idle_tenants(self) -> None:
        """Keeps the counters bounded by the tenants that have requests."""
        active = {r.tenant for r in self.running} | self._waiting.keys()
        if len(self._served) > 2 * len(active) + 64:
            self._served = {t: self._served[t] for t in active}
