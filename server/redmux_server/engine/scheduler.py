"""Scheduler: which tokens of which requests the next step computes. No torch in here."""

from collections import deque

from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.prefix import extend_keys
from redmux_server.engine.request import Request, Work


class Scheduler:
    """Continuous batching with chunked prefill, decodes first, fair over tenants.

    A running request holds cache blocks for its whole length from the start, so whatever was
    admitted can finish: nothing is preempted and nothing fails for lack of memory. Admission
    picks the waiting tenant with the least service so far (virtual token counters, Sheng et al.
    2024), first come first served inside a tenant. Owned by the engine thread.

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
        self._max_running = max_running
        self._max_batch_tokens = max_batch_tokens
        self._prefix_cache = prefix_cache
        self._whole_prompts = whole_prompts
        self.num_cached_tokens = 0  # found in the cache at admissions so far
        self.running: list[Request] = []
        self._waiting: dict[str, deque[Request]] = {}
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
        """Queues a request behind the others of its tenant."""
        if request.tenant not in self._waiting:
            # A tenant that had nothing waiting starts level with those that have: what it did not
            # ask for is not saved up. Where nobody waits, nobody is owed anything.
            if self._waiting:
                level = min(self._served[t] for t in self._waiting)
            else:
                level = max(self._served.values(), default=0)
            self._served[request.tenant] = max(self._served.get(request.tenant, 0), level)
            self._waiting[request.tenant] = deque()
        self._waiting[request.tenant].append(request)

    def ended_early(self) -> list[Request]:
        """Returns every request that its reader has ended; `remove` takes them out."""
        gone = [r for r in self.running if r.early_end is not None]
        for queue in self._waiting.values():
            gone += [r for r in queue if r.early_end is not None]
        return gone

    def share(self, request: Request) -> None:
        """Lets later requests start behind the full blocks that this one has computed.

        Call it once the newest step has drawn a token for it. Nothing is ever written to a shared
        block: it is full, and a request writes behind what it has computed.
        """
        self._extend_keys(request, request.num_computed)
        num_full = request.num_computed // self._blocks.block_size
        for i, key in enumerate(request.block_keys[:num_full]):
            request.blocks[i] = self._blocks.share(request.blocks[i], key)

    def remove(self, request: Request, *, is_sound: bool = True) -> None:
        """Forgets a request and gives its blocks back.

        Its full blocks stay for later requests, unless its computing went wrong.
        """
        if not is_sound:
            self._blocks.forget(request.blocks)
        elif request.num_computed >= len(request.prompt_ids):
            self.share(request)
        if request in self.running:
            self.running.remove(request)
        else:
            self._waiting[request.tenant].remove(request)
            self._drop_empty(request.tenant)
        self._blocks.release(request.blocks)
        request.blocks = []
        self._forget_idle_tenants()

    def plan(self) -> list[Work]:
        """Returns the work of the next step, decodes first, then prefills in order of admission.

        Admits waiting requests while the step's token budget, the running limit and the cache
        allow it. Empty only if nothing can be done.
        """
        work = [self._charge(r, 1) for r in self.running if r.is_decoding]
        budget = self._max_batch_tokens - len(work)
        for request in self.running:
            if budget and not request.is_decoding:
                work.append(self._prefill(request, budget))
                budget -= work[-1].count
        while budget and len(self.running) < self._max_running:
            admitted = self._admit(budget)
            if admitted is None:
                break
            budget -= self._encode(admitted)
            work.append(self._prefill(admitted, budget))
            budget -= work[-1].count
        return work

    def _encode(self, request: Request) -> int:
        """Charges for a source and returns its tokens."""
        self._served[request.tenant] += len(request.source_ids)
        return len(request.source_ids)

    def _prefill(self, request: Request, budget: int) -> Work:
        return self._charge(request, min(budget, len(request.token_ids) - request.num_computed))

    def _charge(self, request: Request, count: int) -> Work:
        # At once: the next admission of the same step must see it.
        self._served[request.tenant] += count
        return Work(request, count)

    def _admit(self, budget: int) -> Request | None:
        if not self._waiting:
            return None
        tenant = min(self._waiting, key=self._served.__getitem__)
        request = self._waiting[tenant][0]
        num_uncut = len(request.prompt_ids) if self._whole_prompts else 1
        if len(request.source_ids) + num_uncut > budget:
            return None
        found = self._find_prefix(request)
        blocks = self._blocks.allocate(request.max_length, found)
        if blocks is None:  # wait for it rather than let smaller requests starve it
            return None
        self._waiting[tenant].popleft()
        self._drop_empty(tenant)
        request.blocks = blocks
        request.num_computed = request.num_cached = len(found) * self._blocks.block_size
        self.num_cached_tokens += request.num_cached
        self.running.append(request)
        return request

    def _find_prefix(self, request: Request) -> list[int]:
        """Returns the cached blocks that the prompt begins with, up to where logits are wanted.

        Those tokens are always computed, the last one of the prompt at least; of a reading, all.
        """
        if request.reading is not None:
            return []
        self._extend_keys(request, len(request.prompt_ids))
        num_usable = request.first_wanted // self._blocks.block_size
        return self._blocks.find(request.block_keys[:num_usable])

    def _extend_keys(self, request: Request, num_tokens: int) -> None:
        if self._prefix_cache:
            extend_keys(
                request.block_keys,
                request.tenant,
                "" if request.adapter is None else request.adapter.digest,
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
