from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields

import pytest
from grpc_health.v1 import health_pb2

import redmux
from redmux.v1 import admin_service_pb2

READINESS = "redmux.v1.InferenceService"


@pytest.mark.parametrize(
    ("status", "health"),
    [
        (health_pb2.HealthCheckResponse.SERVING, "serving"),
        (health_pb2.HealthCheckResponse.NOT_SERVING, "not_serving"),
        (health_pb2.HealthCheckResponse.UNKNOWN, "unknown"),
        (health_pb2.HealthCheckResponse.SERVICE_UNKNOWN, "unknown"),
    ],
)
def test_health_is_that_of_the_inference_service(client, server, status, health):
    server.health.set("", health_pb2.HealthCheckResponse.SERVING)
    server.health.set(READINESS, status)
    assert client.health() == health


def test_health_is_unknown_to_a_server_without_that_service(client):
    assert client.health() == "unknown"


def test_info_has_every_field_of_the_message(client, server):
    server.info = admin_service_pb2.ServerInfo(
        version="1.2.3",
        model="HuggingFaceTB/SmolLM2-135M",
        base_fingerprint="base-1",
        architecture="llama",
        device="cpu",
        dtype="float32",
        choices=["cpu: no accelerator", "float32: exact"],
        bit_identical=True,
        vocab_size=49_152,
        max_context=2_048,
        max_running=64,
        max_batch_tokens=4_096,
        max_queue=512,
        kv_cache_tokens=65_536,
        num_adapters=3,
        num_running=2,
        num_waiting=1,
        uptime_s=12.5,
        kind="decoder",
        trains=True,
        load=admin_service_pb2.Load(
            num_prompt_tokens=70,
            num_completion_tokens=30,
            num_cached_tokens=20,
            num_ended=5,
            num_refused=4,
            num_running_adapters=2,
            kv_cache_used=0.25,
            **{
                name: admin_service_pb2.Latencies(limits_s=[0.5, 1], counts=[1, 0, n], sum_s=3)
                for n, name in enumerate(("first_token", "between_tokens", "whole_request"))
            },
        ),
    )
    assert len(server.info.ListFields()) == len(server.info.DESCRIPTOR.fields)
    assert len(server.info.load.ListFields()) == len(server.info.load.DESCRIPTOR.fields)
    expected = {field.name: value for field, value in server.info.ListFields()}
    expected["choices"] = tuple(server.info.choices)
    expected["load"] = {field.name: value for field, value in server.info.load.ListFields()} | {
        name: {"limits_s": (0.5, 1.0), "counts": (1, 0, n), "sum_s": 3.0}
        for n, name in enumerate(("first_token", "between_tokens", "whole_request"))
    }
    assert asdict(client.info()) == expected


def test_a_server_that_tells_no_load_has_none(client):
    assert client.info().load is None


def test_server_info_and_its_message_have_the_same_fields():
    message = [field.name for field in admin_service_pb2.ServerInfo.DESCRIPTOR.fields]
    assert [field.name for field in fields(redmux.ServerInfo)] == message


def test_wait_ready_returns_once_the_server_serves_and_not_before(client, server, target):
    server.health.set(READINESS, health_pb2.HealthCheckResponse.NOT_SERVING)
    with ThreadPoolExecutor(1) as pool, redmux.Client(target) as other:
        waiting = pool.submit(client.wait_ready, timeout_s=10)
        assert other.health() == "not_serving"
        assert not waiting.done()
        server.health.set(READINESS, health_pb2.HealthCheckResponse.SERVING)
        assert waiting.result() is None


def test_wait_ready_gives_up_in_time(client, server):
    server.health.set(READINESS, health_pb2.HealthCheckResponse.NOT_SERVING)
    with pytest.raises(redmux.DeadlineExceededError, match=r"not ready within 0\.05 s"):
        client.wait_ready(timeout_s=0.05)
