"""What a target may be, and what is said where no server is reached."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import pytest

import redmux


@pytest.mark.parametrize(
    ("target", "advice"),
    [
        ("localhost", "'localhost', which has no port; write localhost:50051"),
        ("10.0.0.7", "no port; write 10.0.0.7:50051"),
        ("::1", r"no port; write \[::1\]:50051"),
        ("[::1]", r"no port; write \[::1\]:50051"),
        ("2001:db8::7", r"no port; write \[2001:db8::7\]:50051"),
        ("dns:///redmux", "no port; write redmux:50051"),
        ("ipv4:10.0.0.1:50051,10.0.0.2", "no port; write 10.0.0.2:50051"),
        ("http://localhost:8000", "a URL; write localhost:8000$"),
        ("http://localhost:8000/", "a URL; write localhost:8000$"),
        ("grpc://inference.internal", "a URL; write inference.internal:50051$"),
        ("https://10.0.0.7", "a URL; write 10.0.0.7:50051 with tls=True"),
        ("a:1,b:2", "several addresses are written 'ipv4:"),
        ("localhost:", "write host:port"),
        (":50051", "write host:port"),
        ("localhost:http", "write host:port"),
        ("localhost:50051/v1", "write host:port"),
        ("local host:50051", "write host:port"),
        ("localhost:99999", "from 1 to 65535, not 99999"),
        ("localhost:0", "from 1 to 65535, not 0"),
        ("", "'host:port', not ''"),
        (None, "'host:port', not None"),
    ],
)
def test_a_target_that_names_no_server_is_refused_with_what_to_write(connect, target, advice):
    with pytest.raises(redmux.InvalidArgumentError, match=advice):
        connect(target)


@pytest.mark.parametrize(
    "target",
    [
        "localhost:50051", "[::1]:1", "dns:localhost:1", "dns:///localhost:65535",
        "dns://10.0.0.53/redmux:50051", "ipv4:10.0.0.1:1,10.0.0.2:1", "ipv6:[::1]:1,[::2]:1",
        "unix:/run/redmux.sock", "unix-abstract:redmux", "a_service.name-space:50051",
    ],
)  # fmt: skip
def test_every_form_of_a_target_is_taken(connect, target):
    connect(target)


@pytest.fixture
def closed_port():
    """A port that is ours, and that nobody listens at."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def http_port():
    """Where a server speaks HTTP/1, as that of /metrics does."""

    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def other_grpc_port():
    """Where a server of gRPC has none of our methods."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(0).wait()


def message_of(client, kind):
    with pytest.raises(kind) as caught:
        client.info()
    return caught.value.message


def test_nobody_listening_is_told_with_the_command_that_would(connect, closed_port):
    assert message_of(connect(f"127.0.0.1:{closed_port}"), redmux.UnavailableError) == (
        f"no server at 127.0.0.1:{closed_port} (connection refused); is `redmux serve` running "
        "there?"
    )


def test_a_missing_socket_is_told_as_nobody_listening(connect, tmp_path):
    client = connect(f"unix:{tmp_path}/none")
    assert message_of(client, redmux.UnavailableError).startswith(f"no server at unix:{tmp_path}")


def test_a_name_that_does_not_exist_is_told(connect):
    message = message_of(connect("no-such-host.invalid:1"), redmux.UnavailableError)
    assert message.startswith("the host of no-such-host.invalid:1 is not known here")


def test_a_port_that_speaks_http_is_told(connect, http_port):
    message = message_of(connect(f"127.0.0.1:{http_port}"), redmux.UnavailableError)
    assert f"127.0.0.1:{http_port} speaks no gRPC; is it the port of another service" in message


def test_a_port_of_another_service_of_grpc_is_told(connect, other_grpc_port):
    message = message_of(connect(f"127.0.0.1:{other_grpc_port}"), redmux.UnimplementedError)
    assert "does not know this call; is it the port of another service" in message


def test_tls_against_plaintext_is_told(connect, other_grpc_port):
    client = connect(f"127.0.0.1:{other_grpc_port}", tls=True)
    assert message_of(client, redmux.UnavailableError).endswith("speaks no TLS; leave out tls=True")


def test_plaintext_against_tls_is_told(connect, tls_target, server):
    message = message_of(connect(tls_target), redmux.UnavailableError)
    assert message.endswith("if it uses TLS, give tls=True or root_certificates")
    assert server.calls == []


def test_a_certificate_of_an_unknown_authority_is_told(connect, tls_target, server):
    message = message_of(connect(tls_target, tls=True), redmux.UnavailableError)
    assert "is not trusted (unable to get local issuer certificate); give that of its" in message
    assert server.calls == []


def test_a_certificate_for_another_name_is_told(connect, tls_target, authority):
    target = tls_target.replace("localhost", "127.0.0.1")
    client = connect(target, tls=True, root_certificates=authority.cert_pem.bytes())
    assert "is for another name" in message_of(client, redmux.UnavailableError)


def test_a_deadline_that_passed_is_told_with_its_length(connect, target, server):
    server.script = server.first_then_silence
    client = connect(target, timeout_s=0.25)
    for call, limit in (
        (lambda: client.generate("Hi"), "0.25"),
        (lambda: client.generate("Hi", timeout_s=0.125), "0.125"),
        (lambda: list(client.stream("Hi", timeout_s=0.5)), "0.5"),
    ):
        with pytest.raises(redmux.DeadlineExceededError) as caught:
            call()
        assert caught.value.message == (
            f"no whole answer from {target} within {limit} s; timeout_s sets the limit"
        )


def test_a_missing_key_is_told_to_whom_sends_none_alone(connect, target, server):
    server.fail = lambda call, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "who?")
    kind = redmux.UnauthenticatedError
    assert message_of(connect(target), kind) == "who?; this client sends none, give api_key"
    assert message_of(connect(target, api_key="x"), kind) == "who?"


def test_a_servers_own_words_stay(connect, target, server):
    words = "the disk said: Connection refused by Socket closed"
    server.fail = lambda call, context: context.abort(grpc.StatusCode.INTERNAL, words)
    assert message_of(connect(target), redmux.RedmuxError) == words
