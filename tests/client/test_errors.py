import grpc
import pytest
from grpc import StatusCode

import redmux

KINDS = {
    StatusCode.CANCELLED: redmux.RequestCancelledError,
    StatusCode.UNKNOWN: redmux.RedmuxError,
    StatusCode.INVALID_ARGUMENT: redmux.InvalidArgumentError,
    StatusCode.DEADLINE_EXCEEDED: redmux.DeadlineExceededError,
    StatusCode.NOT_FOUND: redmux.NotFoundError,
    StatusCode.ALREADY_EXISTS: redmux.AlreadyExistsError,
    StatusCode.PERMISSION_DENIED: redmux.PermissionDeniedError,
    StatusCode.UNAUTHENTICATED: redmux.UnauthenticatedError,
    StatusCode.RESOURCE_EXHAUSTED: redmux.ResourceExhaustedError,
    StatusCode.FAILED_PRECONDITION: redmux.FailedPreconditionError,
    StatusCode.ABORTED: redmux.AbortedError,
    StatusCode.UNIMPLEMENTED: redmux.UnimplementedError,
    StatusCode.INTERNAL: redmux.RedmuxError,
    StatusCode.UNAVAILABLE: redmux.UnavailableError,
    StatusCode.DATA_LOSS: redmux.DataLossError,
    StatusCode.OUT_OF_RANGE: redmux.RedmuxError,
}


def aborting(code, details="the reason", metadata=()):
    def fail(call, context):
        context.set_trailing_metadata(metadata)
        context.abort(code, details)

    return fail


def error_of(client, method="generate"):
    call = client.generate if method == "generate" else lambda prompt: next(client.stream(prompt))
    with pytest.raises(redmux.RedmuxError) as caught:
        call("Hi")
    return caught.value


def test_the_table_has_every_status_but_ok():
    assert set(KINDS) == set(StatusCode) - {StatusCode.OK}


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize("code", KINDS, ids=lambda code: code.name)
def test_every_status_becomes_its_class(connect, target, server, code, method):
    # The pushback keeps UNAVAILABLE from being tried again.
    server.fail = aborting(code, metadata=[("grpc-retry-pushback-ms", "-1")])
    error = error_of(connect(target, api_key="a-key"), method)
    assert type(error) is KINDS[code]
    assert error.message == str(error) == "the reason"


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_no_grpc_error_hides_behind_an_error(client, server, method):
    server.fail = aborting(StatusCode.NOT_FOUND)
    error = error_of(client, method)
    assert error.__suppress_context__
    assert error.__cause__ is None
    assert not isinstance(error, grpc.RpcError)


@pytest.mark.parametrize(
    ("code", "name", "kind"),
    [
        (StatusCode.INVALID_ARGUMENT, "InvalidAdapterError", redmux.InvalidAdapterError),
        (StatusCode.FAILED_PRECONDITION, "WrongBaseError", redmux.WrongBaseError),
        (StatusCode.INVALID_ARGUMENT, "FutureError", redmux.InvalidArgumentError),
        (StatusCode.INVALID_ARGUMENT, "WrongBaseError", redmux.InvalidArgumentError),
        (StatusCode.INTERNAL, "WrongBaseError", redmux.RedmuxError),
        (StatusCode.NOT_FOUND, "NotFoundError", redmux.NotFoundError),
    ],
)
def test_a_class_named_by_the_server_is_raised_if_it_fits_the_status(
    client, server, code, name, kind
):
    server.fail = aborting(code, metadata=[("redmux-error", name)])
    assert type(error_of(client)) is kind


@pytest.mark.parametrize(
    ("metadata", "retry_after_s"),
    [
        ([("grpc-retry-pushback-ms", "1500")], 1.5),
        ([("grpc-retry-pushback-ms", "0")], 0.0),
        ([("grpc-retry-pushback-ms", "-1")], None),
        ([("grpc-retry-pushback-ms", "soon")], None),
        ([], None),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_a_full_server_tells_when_to_come_back(client, server, method, metadata, retry_after_s):
    server.fail = aborting(StatusCode.RESOURCE_EXHAUSTED, "queue is full", metadata)
    error = error_of(client, method)
    assert isinstance(error, redmux.ResourceExhaustedError)
    assert error.retry_after_s == retry_after_s
    assert len(server.calls) == 1


def test_an_error_without_a_message_names_its_status(client, server):
    server.fail = aborting(StatusCode.ABORTED, "")
    assert "ABORTED" in error_of(client).message


def test_every_method_translates_errors(client, server):
    server.fail = aborting(StatusCode.PERMISSION_DENIED)
    calls = [
        client.info,
        lambda: client.adapters.put("a", b""),
        lambda: client.adapters.get("a"),
        lambda: list(client.adapters.list()),
        lambda: client.adapters.delete("a"),
    ]
    for call in calls:
        with pytest.raises(redmux.PermissionDeniedError):
            call()
    assert len(server.calls) == len(calls)
