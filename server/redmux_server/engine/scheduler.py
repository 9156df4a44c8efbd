"""Scheduler: which tokens of which requests the next step computes. No torch in here."""

from collections import deque

from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.request import Request, Work


class Scheduler:
    """Continuous batching with chunked prefill, decodes first, fair over tenants.

    A running request holds cache blocks for its whole length from the start, so whatever was
    admitted can finish: nothing is preempted and nothing fails for lack of memory. Admission
    picks the waiting tenant with the least service so far (virtual token counters, Sheng et al.
    2024), first come first served inside a tenant. Owned by the engine thread.
    """

    def __init__(self, blocks: BlockPool, *, max_running: int, max_batch_tokens: int) -> None:
        """`max_batch_tokens` bounds the tokens of one step, and so how long it takes."""
        if max_batch_tokens < max_running:
            raise ValueError("max_batch_tokens must be at least max_running: decodes go first")
        self._blocks = blocks
        self._max_running = max_running
        self._max_batch_tokens = max_batch_tokens
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

    def remove(self, request: Request) -> None:
        """Forgets a request and frees its blocks."""
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
            admitted = self._admit()
            if admitted is None:
                break
            work.append(self._prefill(admitted, budget))
            budget -= work[-1].count
        return work

    def _prefill(self, request: Request, budget: int) -> Work:
        return self._charge(request, min(budget, len(request.token_ids) - request.num_computed))

    def _charge(self, request: Request, count: int) -> Work:
        # At once: the next admission of the same step must see it.
        self._served[request.tenant] += count
        return Work(request, count)

    def _admit(self) -> Request | None:
        if not self._waiting:
            return None
        tenant = min(self._waiting, key=self._served.__getitem__)
        request = self._waiting[tenant][0]
        blocks = self._blocks.allocate(request.max_length)
        if blocks is None:  # wait for it rather than let smaller requests starve it
            return None
        self._waiting[tenant].popleft()
        self._drop_empty(tenant)
        request.blocks = blocks
        self.running.append(request)
        return request

    def _drop_empty(self, tenant: str) -> None:
        if not self._waiting[tenant]:
            del self._waiting[tenant]

    def _forget_idle_tenants(self) -> None:
        """Keeps the counters bounded by the tenants that have requests."""
        active = {r.tenant for r in self.running} | self._waiting.keys()
        if len(self._served) > 2 * len(active) + 64:
            self._served = {t: self._served[t] for t in active}
