"""The connection under a client: target, TLS, API key, deadlines, retries, errors.

Everything here serves both clients; `Connection` and `AsyncConnection` are the only places where
gRPC is called and where its errors become redmux errors.
"""

# gRPC's callables take type arguments in their stubs only.
from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio

from redmux import _server_calls, _statuses
from redmux._options import channel_options
from redmux._started_call import StartedCall
from redmux._target import check_target, explained, is_shared
from redmux.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    RedmuxError,
    RequestCancelledError,
    UnavailableError,
)
from redmux.v1.adapter_service_pb2_grpc import AdapterServiceStub
from redmux.v1.admin_service_pb2_grpc import AdminServiceStub
from redmux.v1.inference_service_pb2_grpc import InferenceServiceStub
from redmux.v1.training_service_pb2_grpc import TrainingServiceStub

if TYPE_CHECKING:
    # Names of the .pyi files only.
    from redmux.v1.adapter_service_pb2_grpc import AdapterServiceAsyncStub
    from redmux.v1.admin_service_pb2_grpc import AdminServiceAsyncStub
    from redmux.v1.inference_service_pb2_grpc import InferenceServiceAsyncStub
    from redmux.v1.training_service_pb2_grpc import TrainingServiceAsyncStub

Request = TypeVar("Request")
Response = TypeVar("Response")
Value = TypeVar("Value")

STREAM_TIMEOUT_S = 600.0
WATCH_TIMEOUT_S = 7 * 86_400.0  # training takes hours, and a stream without a limit could leak
READY_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Settings:
    """How to reach a server; checked when made, without any I/O."""

    target: str
    api_key: str | None = field(repr=False)
    tls: bool | grpc.ChannelCredentials
    root_certificates: bytes | None = field(repr=False)
    timeout_s: float

    def __post_init__(self) -> None:
        check_target(self.target)
        if not isinstance(self.tls, bool | grpc.ChannelCredentials):
            raise InvalidArgumentError(f"tls is a bool or credentials, not {self.tls!r}")
        if self.root_certificates is not None:
            _check_root_certificates(self.root_certificates, self.tls)
        if self.api_key is not None:
            _check_api_key(self.api_key)
        _check_timeout(self.timeout_s)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call.

        Not call credentials, which gRPC refuses to send over plaintext, even to this very machine.
        """
        return () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """TLS credentials; None is plaintext."""
        if isinstance(self.tls, grpc.ChannelCredentials):
            return self.tls
        return grpc.ssl_channel_credentials(self.root_certificates) if self.tls else None

    @property
    def options(self) -> tuple[tuple[str, int | str], ...]:
        """Channel options; several servers behind the target share the calls."""
        return channel_options(is_shared=is_shared(self.target))

    def deadline_s(self, timeout_s: float | None, default_s: float | None = None) -> float:
        """Returns the seconds that a call may take; there is always a limit."""
        if timeout_s is None:
            return self.timeout_s if default_s is None else default_s
        return _check_timeout(timeout_s)

    def error_of(self, error: grpc.RpcError, timeout_s: float, *, is_closed: bool) -> RedmuxError:
        """Returns what a failed call of a client, closed or not, raises.

        gRPC's own texts become sentences with a remedy.
        """
        raised = _statuses.error_of(error)
        if raised.message == "CANCELLED" and not is_closed:
            raised = UnavailableError(f"the server at {self.target} stopped during the call")
        return explained(
            raised, self.target, timeout_s,
            has_tls=self.tls is not False, has_key=self.api_key is not None,
        )  # fmt: skip


def _check_root_certificates(pem: bytes, tls: bool | grpc.ChannelCredentials) -> None:
    if tls is not True:
        raise InvalidArgumentError("root_certificates needs tls=True")
    if not isinstance(pem, bytes) or b"-----BEGIN CERTIFICATE-----" not in pem:
        raise InvalidArgumentError("root_certificates is no bytes with certificates in PEM form")


def _check_api_key(api_key: str) -> None:
    if not isinstance(api_key, str) or not (api_key.isascii() and api_key.isprintable()):
        raise InvalidArgumentError("api_key is not a text of printable ASCII characters")
    if not api_key:
        raise InvalidArgumentError("api_key is empty; leave it out to send none")


def _check_timeout(timeout_s: float) -> float:
    if not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
        raise InvalidArgumentError(f"timeout_s is a positive number of seconds, not {timeout_s!r}")
    return timeout_s


def _closed() -> FailedPreconditionError:
    return FailedPreconditionError("the client is closed; make another one")


class Connection:
    """A channel, its stubs and the ways to call them. Any thread may use it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        credentials = settings.credentials
        self._channel = (
            grpc.insecure_channel(settings.target, settings.options)
            if credentials is None
            else grpc.secure_channel(settings.target, credentials, settings.options)
        )
        self._is_closed = False
        self.inference = InferenceServiceStub(self._channel)
        self.adapters = AdapterServiceStub(self._channel)
        self.admin = AdminServiceStub(self._channel)
        self.training = TrainingServiceStub(self._channel)
        self.health: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(
            _server_calls.HEALTH_METHOD
        )

    def unary(
        self,
        method: grpc.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        timeout_s: float | None = None,
    ) -> Response:
        """Returns the response to one request."""
        deadline_s = self.settings.deadline_s(timeout_s)
        try:
            return method(request, timeout=deadline_s, metadata=self.settings.metadata)
        except grpc.RpcError as error:
            raise self.settings.error_of(error, deadline_s, is_closed=self._is_closed) from None
        except ValueError:
            self._check_open()
            raise

    def start(
        self,
        method: grpc.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        timeout_s: float | None,
        value: Callable[[Response], Value],
    ) -> StartedCall[Response, Value]:
        """Sends one request and returns the call, whose result is `value` of the response."""
        deadline_s = self.settings.deadline_s(timeout_s)
        try:
            call = method.future(request, timeout=deadline_s, metadata=self.settings.metadata)
        except ValueError:
            self._check_open()
            raise
        return StartedCall(
            call, value,
            lambda error: self.settings.error_of(error, deadline_s, is_closed=self._is_closed),
        )  # fmt: skip

    def stream(
        self,
        method: grpc.UnaryStreamMultiCallable[Request, Response],
        request: Request,
        timeout_s: float,
    ) -> Generator[Response, None, None]:
        """Yields the responses to one request; the call ends when the iterator is closed."""
        try:
            call = method(request, timeout=timeout_s, metadata=self.settings.metadata)
        except ValueError:
            self._check_open()
            raise
        try:
            yield from call
        except grpc.RpcError as error:
            raise self.settings.error_of(error, timeout_s, is_closed=self._is_closed) from None
        finally:
            call.cancel()

    def _check_open(self) -> None:
        """Raises FailedPreconditionError if gRPC's ValueError means that the client is closed.

        Asked afterwards, since another thread may close at any moment before.
        """
        if self._is_closed:
            raise _closed() from None

    def close(self) -> None:
        """Ends all calls and frees the channel; closing again does nothing."""
        self._is_closed = True
        self._channel.close()


class AsyncConnection:
    """The same for asyncio. It belongs to the event loop of its first call."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._is_closed = False
        # Older versions of gRPC do not find all of them when the channel closes.
        self._running: set[grpc.aio.Call] = set()

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        # Made by the first call: an aio channel binds to the loop that runs when it is made, and
        # clients may well be made before the loop runs.
        credentials = self.settings.credentials
        if credentials is None:
            return grpc.aio.insecure_channel(self.settings.target, self.settings.options)
        return grpc.aio.secure_channel(self.settings.target, credentials, self.settings.options)

    def _open_channel(self) -> grpc.aio.Channel:
        # A stub made on a closed channel registers its methods in memory that gRPC has freed.
        if self._is_closed:
            raise _closed()
        return self._channel

    @cached_property
    def inference(self) -> InferenceServiceAsyncStub:
        """Stub of InferenceService."""
        return InferenceServiceStub(self._open_channel())

    @cached_property
    def adapters(self) -> AdapterServiceAsyncStub:
        """Stub of AdapterService."""
        return AdapterServiceStub(self._open_channel())

    @cached_property
    def admin(self) -> AdminServiceAsyncStub:
        """Stub of AdminService."""
        return AdminServiceStub(self._open_channel())

    @cached_property
    def training(self) -> TrainingServiceAsyncStub:
        """Stub of TrainingService."""
        return TrainingServiceStub(self._open_channel())

    @cached_property
    def health(self) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
        """The health check, on encoded messages."""
        return self._open_channel().unary_unary(_server_calls.HEALTH_METHOD)

    async def unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        timeout_s: float | None = None,
    ) -> Response:
        """Returns the response to one request."""
        if self._is_closed:
            raise _closed()
        deadline_s = self.settings.deadline_s(timeout_s)
        call = method(request, timeout=deadline_s, metadata=self.settings.metadata)
        self._running.add(call)
        try:
            return await call
        except grpc.RpcError as error:
            raise self.settings.error_of(error, deadline_s, is_closed=self._is_closed) from None
        except asyncio.CancelledError:
            self._check_cancelled()
            raise
        finally:
            self._running.discard(call)

    async def stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Request, Response],
        request: Request,
        timeout_s: float,
    ) -> AsyncGenerator[Response, None]:
        """Yields the responses to one request; the call ends when the iterator is closed."""
        if self._is_closed:
            raise _closed()
        call = method(request, timeout=timeout_s, metadata=self.settings.metadata)
        self._running.add(call)
        try:
            async for response in call:
                yield response
        except grpc.RpcError as error:
            raise self.settings.error_of(error, timeout_s, is_closed=self._is_closed) from None
        except asyncio.CancelledError:
            self._check_cancelled()
            raise
        finally:
            self._running.discard(call)
            call.cancel()

    def _check_cancelled(self) -> None:
        """Raises RequestCancelledError if close() ended the call, rather than its own task.

        gRPC raises CancelledError for both, which would end the task of a caller without a word.
        """
        task = asyncio.current_task()
        if self._is_closed and task is not None and not task.cancelling():
            raise RequestCancelledError("the client was closed during the call") from None

    async def close(self) -> None:
        """Ends all calls and frees the channel; closing again does nothing."""
        self._is_closed = True
        for call in tuple(self._running):
            call.cancel()
        if "_channel" in vars(self):
            await self._channel.close()
