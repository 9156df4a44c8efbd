"""One client and several servers, of which some drain, load or restart."""

import socket
import threading

import grpc
import pytest
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse

import redmux


@pytest.fixture
def pair(server, serve):
    """Two servers and the target that names both."""
    pair = (server, type(server)())
    ports = [serve(each).removeprefix("127.0.0.1:") for each in pair]
    return pair, [int(port) for port in ports], f"ipv4:127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}"


def until(condition, call):
    """Calls until the condition holds."""
    for _ in range(2000):
        if condition():
            return
        call()
    pytest.fail("it never happened")


def test_several_servers_share_the_calls(connect, pair):
    (one, other), _, target = pair
    client = connect(target)
    until(lambda: one.calls and other.calls, client.info)


def test_a_server_that_does_not_serve_gets_no_calls(connect, pair):
    (one, other), _, target = pair
    one.health.set("", HealthCheckResponse.NOT_SERVING)
    client = connect(target)
    until(lambda: len(other.calls) > 50, client.info)
    assert one.calls == []
    one.health.set("", HealthCheckResponse.SERVING)
    until(lambda: one.calls, client.info)


def test_no_server_that_serves_is_told(connect, pair):
    servers, _, target = pair
    for each in servers:
        each.health.set("", HealthCheckResponse.NOT_SERVING)
    with pytest.raises(redmux.UnavailableError, match=r"no server of .* is serving now"):
        connect(target).info()


def test_calls_that_a_stopping_server_cancels_are_tried_again(connect, pair):
    (one, other), _, target = pair
    one.fail = lambda call, context: context.abort(grpc.StatusCode.CANCELLED, "")
    client = connect(target)
    until(lambda: len(one.calls) > 3, client.info)
    assert other.calls


def refusing(call, context):
    context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")


def test_all_of_many_calls_that_are_refused_at_once_are_tried_again(connect, target, server):
    def refuse_first_attempts(call, context):
        if "grpc-previous-rpc-attempts" not in call.metadata:
            refusing(call, context)

    server.fail = refuse_first_attempts
    client = connect(target)
    assert [client.generate("Hi").text for _ in range(30)] == ["Hello world"] * 30


def test_a_rolling_restart_loses_no_call(pair, serve):
    """Each server ends as soon as the one before it is back: faster than any operator.

    It is back after the client has tried to connect to it often, so seldom by then.
    """
    servers, ports, target = pair
    is_over = threading.Event()
    answers, errors = [], []
    answered = threading.Condition()

    def work(client):
        while not is_over.is_set():
            try:
                answers.append(client.generate("Hi").text)
            except redmux.RedmuxError as error:
                errors.append(error)
            with answered:
                answered.notify_all()

    def wait_for(count):
        wanted = len(answers) + count
        with answered:
            assert answered.wait_for(lambda: len(answers) >= wanted or errors, 60)

    with redmux.Client(target) as client:
        threads = [threading.Thread(target=work, args=(client,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_for(50)
        for each, port in zip(servers, ports, strict=True):
            each.health.set("", HealthCheckResponse.NOT_SERVING)
            each.fail = refusing
            each.stop()
            with socket.create_server(("127.0.0.1", port)) as nobody:
                for _ in range(7):
                    nobody.accept()[0].close()
            each.fail, each.health = (lambda call, context: None), HealthServicer()
            serve(each, port=port)
        wait_for(50)
        is_over.set()
        for thread in threads:
            thread.join()
    assert errors == []
