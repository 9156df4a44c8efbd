"""All Prometheus collectors of the server."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from redmux_server.engine.request import Event, Failed, Finished, Read, Request, Work

if TYPE_CHECKING:
    from redmux_server.engine.bank import AdapterBank
    from redmux_server.engine.scheduler import Scheduler

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The collectors, in a registry of their own so that two servers can share a process.

    No label is made from what a client sends: outcomes and kinds are fixed sets.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter("redmux_requests", "Requests that ended.", ["outcome"], registry=r)
        self.requests_refused = Counter(
            "redmux_requests_refused", "Requests refused before queueing.", ["code"], registry=r
        )
        self.tokens = Counter("redmux_tokens", "Tokens computed.", ["kind"], registry=r)
        self._prefill_tokens = self.tokens.labels("prefill")
        self._decode_tokens = self.tokens.labels("decode")
        self._draft_tokens = Counter(
            "redmux_draft_tokens", "Guessed tokens that were computed beside the newest one.",
            registry=r,
        )  # fmt: skip
        self._accepted_tokens = Counter(
            "redmux_draft_tokens_accepted", "Those of them that were drawn.", registry=r
        )
        self.cached_tokens = Counter(
            "redmux_prompt_tokens_cached", "Prompt tokens found in the cache, so not computed.",
            registry=r,
        )  # fmt: skip
        self.sent_back = Counter(
            "redmux_requests_sent_back",
            "Times that a running request lost its place, to another tenant or for lack of cache.",
            registry=r,
        )  # fmt: skip
        self.first_token_s = Histogram(
            "redmux_time_to_first_token_seconds", "From acceptance to the first token.",
            buckets=_LATENCY_S, registry=r,
        )  # fmt: skip
        self.inter_token_s = Histogram(
            "redmux_inter_token_latency_seconds", "Between two tokens of one request.",
            buckets=_LATENCY_S, registry=r,
        )  # fmt: skip
        self.request_s = Histogram(
            "redmux_request_duration_seconds", "From acceptance to the end.",
            buckets=(*_LATENCY_S, 120, 300, 600), registry=r,
        )  # fmt: skip
        self._step_s = Histogram(
            "redmux_step_duration_seconds", "One forward pass with sampling.",
            buckets=_LATENCY_S, registry=r,
        )  # fmt: skip
        self._batch_rows = Histogram(
            "redmux_batch_requests", "Requests in one step.", buckets=_COUNTS, registry=r
        )
        self._batch_adapters = Histogram(
            "redmux_batch_distinct_adapters", "Distinct adapters in one step, base not counted.",
            buckets=(0, *_COUNTS), registry=r,
        )  # fmt: skip
        self.adapter_load_s = Histogram(
            "redmux_adapter_load_seconds", "Copying an adapter into the bank.",
            buckets=(0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 1), registry=r,
        )  # fmt: skip
        self._running = Gauge("redmux_requests_running", "Requests in the batch.", registry=r)
        self.running_adapters = Gauge(
            "redmux_requests_running_distinct_adapters",
            "Distinct adapters of the requests in the batch, base not counted.", registry=r,
        )  # fmt: skip
        self._waiting = Gauge("redmux_requests_waiting", "Requests in the queue.", registry=r)
        self.kv_used = Gauge(
            "redmux_kv_cache_used_ratio", "Share of cache blocks in use.", registry=r
        )
        self._bank_slots = Gauge("redmux_bank_slots", "Rows of the adapter bank.", registry=r)
        self._bank_resident = Gauge(
            "redmux_bank_resident_adapters", "Adapters that hold a row.", registry=r
        )
        self._bank_bytes = Gauge("redmux_bank_bytes", "Size of the adapter bank.", registry=r)
        self.adapters = Gauge("redmux_adapters", "Published adapters.", registry=r)
        self._training_jobs = Counter(
            "redmux_training_jobs", "Training jobs that ended.", ["state"], registry=r
        )
        self._training_tasks = Counter(
            "redmux_training_tasks", "Adapters whose training ended.", ["state"], registry=r
        )
        self.training_tokens = Counter(
            "redmux_training_tokens", "Tokens of examples that were trained on.", registry=r
        )
        self._training_running = Gauge(
            "redmux_training_jobs_running", "Jobs that are being trained.", registry=r
        )
        self._training_waiting = Gauge(
            "redmux_training_jobs_waiting", "Jobs in the queue.", registry=r
        )

    def refused(self, code: str) -> None:
        """Counts a request that was not accepted, at the door or later, by its status code."""
        self.requests_refused.labels(code).inc()

    def ended(self, event: Event, duration_s: float) -> None:
        """Counts the end of an accepted request."""
        if isinstance(event, Finished):
            outcome = event.reason.value
        elif isinstance(event, Read):
            outcome = "read"
        else:
            assert isinstance(event, Failed)
            outcome = event.error.status.name.lower()
        self.requests.labels(outcome).inc()
        self.request_s.observe(duration_s)

    def training_job(self, state: str) -> None:
        """Counts the end of a job."""
        self._training_jobs.labels(state).inc()

    def training_task(self, state: str) -> None:
        """Counts the end of the training of one adapter."""
        self._training_tasks.labels(state.replace(" ", "_")).inc()

    def training_state(self, num_running: int, num_waiting: int) -> None:
        """Sets the gauges that describe the jobs."""
        self._training_running.set(num_running)
        self._training_waiting.set(num_waiting)

    def step(
        self, work: Sequence[Work], num_decodes: int, num_encoded: int, num_accepted: int,
        duration_s: float,
    ) -> None:  # fmt: skip
        """Observes one step after it was committed.

        `num_encoded` tokens were of sources, `num_accepted` of those of drafts were drawn, which
        count as decodes then.
        """
        self._step_s.observe(duration_s)
        self._batch_rows.observe(len(work))
        self._batch_adapters.observe(_num_adapters(item.request for item in work))
        num_drafted = sum(len(item.draft) for item in work)
        self._draft_tokens.inc(num_drafted)
        self._accepted_tokens.inc(num_accepted)
        self._decode_tokens.inc(num_decodes + num_accepted)
        num_known = sum(item.num_known for item in work)
        self._prefill_tokens.inc(num_known - num_decodes + num_encoded)

    def state(self, scheduler: "Scheduler", bank: "AdapterBank") -> None:
        """Sets the gauges that describe the engine after a step."""
        self._running.set(len(scheduler.running))
        self.running_adapters.set(_num_adapters(scheduler.running))
        self._waiting.set(scheduler.num_waiting)
        self.kv_used.set(scheduler.kv_used_ratio)
        self._bank_slots.set(bank.num_slots)
        self._bank_resident.set(bank.num_resident)
        self._bank_bytes.set(bank.nbytes)


def _num_adapters(requests: Iterable[Request]) -> int:
    return len({r.adapter.digest for r in requests if r.adapter is not None})
