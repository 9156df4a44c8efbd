"""What GetServerInfo tells of the load: the collectors' figures as a message."""

from collections.abc import Callable

from prometheus_client import Histogram
from prometheus_client.metrics import MetricWrapperBase

from redmux.v1 import admin_service_pb2 as pb
from redmux_server.metrics import Metrics


def load_message(metrics: Metrics) -> pb.Load:
    """Returns what the server does now and has done since its start."""
    return pb.Load(
        num_prompt_tokens=_count(metrics.tokens, lambda labels: labels["kind"] == "prefill"),
        num_completion_tokens=_count(metrics.tokens, lambda labels: labels["kind"] == "decode"),
        num_cached_tokens=_count(metrics.cached_tokens),
        num_ended=_count(metrics.requests),
        num_refused=_count(metrics.requests_refused),
        num_running_adapters=_count(metrics.running_adapters),
        kv_cache_used=_total(metrics.kv_used),
        first_token=_latencies(metrics.first_token_s),
        between_tokens=_latencies(metrics.inter_token_s),
        whole_request=_latencies(metrics.request_s),
    )


def _any(labels: dict[str, str]) -> bool:
    return True


def _count(
    collector: MetricWrapperBase, are_wanted: Callable[[dict[str, str]], bool] = _any
) -> int:
    return int(_total(collector, are_wanted))


def _total(
    collector: MetricWrapperBase, are_wanted: Callable[[dict[str, str]], bool] = _any
) -> float:
    """Returns a gauge's value, or a counter's over all labels that are wanted."""
    (family,) = collector.collect()
    return sum(
        sample.value
        for sample in family.samples
        if not sample.name.endswith("_created") and are_wanted(sample.labels)
    )


def _latencies(histogram: Histogram) -> pb.Latencies:
    (family,) = histogram.collect()
    found = pb.Latencies()
    below = 0
    for sample in family.samples:
        if sample.name.endswith("_bucket"):  # each holds all those before it
            found.counts.append(int(sample.value) - below)
            below = int(sample.value)
            if sample.labels["le"] != "+Inf":
                found.limits_s.append(float(sample.labels["le"]))
        elif sample.name.endswith("_sum"):
            found.sum_s = sample.value
    return found
