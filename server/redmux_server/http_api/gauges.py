"""GatewayGauges: the four gauges of vLLM's that Kubernetes' inference gateway routes by."""

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from redmux_server.engine.engine import Engine
from redmux_server.registry.registry import AdapterRegistry

_MAX_NAMES = 64  # of each label


class GatewayGauges:
    """Collected when they are asked for, on the event loop.

    The names of adapters are labels, as the gateway wants them: at most 64 of those that run and of
    those that wait, in one series, and none that is not the operator's.
    """

    def __init__(
        self, model: str, max_running: int, engine: Engine, adapters: AdapterRegistry
    ) -> None:
        self._model = model
        self._max_running = max_running
        self._engine = engine
        self._adapters = adapters

    def register(self, registry: CollectorRegistry) -> None:
        """Adds them to what is told."""
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        engine = self._engine
        num_running = engine.num_running
        for name, text, value in (
            ("running", "Requests in the batch.", num_running),
            ("waiting", "Requests in the queue.", max(0, engine.num_open - num_running)),
        ):
            yield self._gauge(f"vllm:num_requests_{name}", text, value)
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "Share of cache blocks in use, from 0 to 1.",
            engine.kv_used_ratio,
        )  # fmt: skip
        running, waiting = engine.open_digests()
        info = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters of open requests; the value is the time.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )  # fmt: skip
        labels = (str(self._max_running), self._names(running), self._names(waiting))
        info.add_metric(labels, time.time())
        yield info

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(name, text, labels=("model_name",))
        gauge.add_metric((self._model,), value)
        return gauge

    def _names(self, digests: Iterable[str]) -> str:
        names: list[str] = []
        for digest in digests:
            names += self._adapters.operators_names(digest)
            if len(names) >= _MAX_NAMES:
                break
        return ",".join(sorted(names[:_MAX_NAMES]))
