"""The asynchronous client: the same names as the synchronous one."""

import asyncio
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc

from redmux import _calls, _server_calls
from redmux._channel import READY_POLL_S, STREAM_TIMEOUT_S, AsyncConnection, Settings
from redmux._mapping import CONCURRENCY, check_mapping, map_in_order_async
from redmux._progress import Progress, total_of
from redmux._source import AdapterConfig, AdapterSource, read_source
from redmux.errors import DeadlineExceededError, NotFoundError, RedmuxError, UnavailableError
from redmux.mixes import Mix
from redmux.server_types import Health, ServerInfo
from redmux.training import AsyncJobs
from redmux.types import (
    Adapter,
    ChatOptions,
    Chunk,
    Classifications,
    Completion,
    Continuation,
    Embeddings,
    GenerationOptions,
    Pooling,
    Prompt,
    Scores,
    TextInput,
    Tokens,
)
from redmux.v1 import adapter_service_pb2, admin_service_pb2
from redmux.v1 import inference_service_pb2 as inference_pb2


class AsyncClient:
    """A connection to one redmux server, for any number of tasks of one event loop.

    Takes and raises what `Client` does. May be made before the loop runs; it belongs to the loop of
    its first call.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        api_key: str | None = None,
        tls: bool | grpc.ChannelCredentials = False,
        root_certificates: bytes | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        settings = Settings(target, api_key, tls, root_certificates, timeout_s)
        self._connection = AsyncConnection(settings)
        self.adapters = AsyncAdapters(self._connection)
        self.jobs = AsyncJobs(self._connection)

    async def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Completion:
        """Returns the whole completion of a text, of token ids or of chat messages.

        Raises InvalidArgumentError before anything is sent for arguments of a wrong kind.
        Cancelling the task cancels the request.
        """
        generation = _calls.generation(prompt, **options)
        request = inference_pb2.CompleteRequest(generation=generation)
        response = await self._connection.unary(
            self._connection.inference.Complete, request, timeout_s
        )
        return _calls.completion(response, generation.logprobs)

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncGenerator[Chunk, None]:
        """Yields the completion as it is decoded; its last chunk has a `finish_reason`.

        Takes what `generate` takes. The request is sent when the first chunk is asked for, has 600
        seconds unless `timeout_s` says otherwise, and is cancelled when the iterator is closed. An
        error part-way comes after all chunks that arrived. Leaving an `async for` early does not
        close its iterator; `contextlib.aclosing` around it does.
        """
        generation = _calls.generation(prompt, **options)
        deadline_s = self._connection.settings.deadline_s(timeout_s, STREAM_TIMEOUT_S)
        return self._chunks(generation, deadline_s)

    async def _chunks(
        self, generation: inference_pb2.Generation, deadline_s: float
    ) -> AsyncGenerator[Chunk, None]:
        request = inference_pb2.GenerateRequest(generation=generation)
        method = self._connection.inference.Generate
        num_left = generation.sampling.n or 1
        async with aclosing(self._connection.stream(method, request, deadline_s)) as messages:
            async for message in messages:
                chunk = _calls.chunk(message, generation.logprobs)
                num_left -= chunk.finish_reason is not None
                yield chunk
        if num_left > 0:
            raise _calls.unfinished()

    @overload
    def map(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        *,
        concurrency: int = ...,
        progress: bool = ...,
        return_exceptions: Literal[False] = ...,
        timeout_s: float | None = ...,
        **options: Unpack[GenerationOptions],
    ) -> AsyncGenerator[Completion, None]: ...

    @overload
    def map(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        *,
        concurrency: int = ...,
        progress: bool = ...,
        return_exceptions: bool,
        timeout_s: float | None = ...,
        **options: Unpack[GenerationOptions],
    ) -> AsyncGenerator[Completion | RedmuxError, None]: ...

    def map(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        *,
        concurrency: int = CONCURRENCY,
        progress: bool = False,
        return_exceptions: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncGenerator[Any, None]:
        """Yields the completions of many prompts, in their order.

        Takes what `generate` takes. At most `concurrency` requests are under way, and prompts are
        asked for as there is room, so there may be any number of them; `timeout_s` limits each
        request. The first error, in the order of the prompts, ends it; with `return_exceptions` it
        is yielded in the completion's place instead. `progress` counts on stderr, by tqdm where
        that is installed. Closing the iterator
        cancels what is under way; `contextlib.aclosing` does that.
        """
        check_mapping(prompts, concurrency, is_async=True)
        self._connection.settings.deadline_s(timeout_s)
        return map_in_order_async(
            lambda prompt: self.generate(prompt, timeout_s=timeout_s, **options), prompts,
            concurrency=concurrency, return_exceptions=return_exceptions,
            progress=Progress(is_wanted=progress, total=total_of(prompts)),
        )  # fmt: skip

    async def classify(
        self, inputs: Sequence[TextInput], *, adapter: str | Mix, timeout_s: float | None = None
    ) -> Classifications:
        """Returns what the classification head of an adapter makes of each input.

        Needs a server with an encoder. Raises FailedPreconditionError for an adapter without a
        head and InvalidArgumentError before anything is sent for arguments of a wrong kind.
        """
        request = _calls.classify_request(inputs, adapter)
        response = await self._connection.unary(
            self._connection.inference.Classify, request, timeout_s
        )
        return _calls.classifications(response)

    async def embed(
        self,
        inputs: Sequence[TextInput],
        *,
        adapter: str | Mix | None = None,
        pooling: Pooling | None = None,
        normalize: bool = False,
        timeout_s: float | None = None,
    ) -> Embeddings:
        """Returns a vector for each input, scaled to length 1 if `normalize`.

        `adapter` None is the bare base model. `pooling` None is the mean over all tokens for an
        encoder and the last token for a decoder. Raises as `classify` does.
        """
        request = _calls.embed_request(inputs, adapter, pooling, normalize)
        response = await self._connection.unary(
            self._connection.inference.Embed, request, timeout_s
        )
        return _calls.embeddings(response)

    async def score(
        self,
        prompt: Prompt,
        continuations: Sequence[Continuation] = (),
        *,
        adapter: str | Mix | None = None,
        prompt_logprobs: bool = False,
        apply: str | None = None,
        parse_special_tokens: bool = False,
        timeout_s: float | None = None,
    ) -> Scores:
        """Returns how likely each continuation of the prompt is, and with `prompt_logprobs` it too.

        Each continuation is scored as if it were the only one. Takes what `generate` takes for
        prompts; raises InvalidArgumentError before anything is sent for arguments of a wrong kind.
        """
        request = _calls.score_request(
            prompt,
            continuations,
            adapter=adapter,
            prompt_logprobs=prompt_logprobs,
            apply=apply,
            parse_special_tokens=parse_special_tokens,
        )
        method = self._connection.inference.Score
        return _calls.scores(await self._connection.unary(method, request, timeout_s))

    async def tokenize(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        adapter: str | None = None,
        add_special_tokens: bool | None = None,
        token_texts: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> Tokens:
        """Returns the tokens that a text or chat messages become, as a completion begins with them.

        `add_special_tokens` False leaves out what the model's tokenizer puts before a text;
        `token_texts` returns the text of each token, too. Options are those of chats that
        `generate` takes. Raises as `score` does.
        """
        request = _calls.tokenize_request(prompt, adapter, add_special_tokens, token_texts, options)
        method = self._connection.inference.Tokenize
        response = await self._connection.unary(method, request, timeout_s)
        return _calls.tokens(response, token_texts)

    async def detokenize(self, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """Returns the text of tokens, special ones among them. Raises as `score` does."""
        request = _calls.detokenize_request(token_ids)
        method = self._connection.inference.Detokenize
        return (await self._connection.unary(method, request, timeout_s)).text

    async def health(self) -> Health:
        """Returns whether the server is ready to generate."""
        try:
            response = await self._connection.unary(
                self._connection.health, _server_calls.HEALTH_REQUEST
            )
        except NotFoundError:
            return "unknown"
        return _server_calls.health(response)

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns once the server is ready, for as long as it may still be starting.

        Raises DeadlineExceededError after `timeout_s` seconds.
        """
        end_s = time.monotonic() + timeout_s
        while True:
            with suppress(UnavailableError):
                if await self.health() == "serving":
                    return
            if time.monotonic() > end_s:
                raise DeadlineExceededError(f"the server was not ready within {timeout_s:g} s")
            await asyncio.sleep(READY_POLL_S)

    async def info(self) -> ServerInfo:
        """Returns what the server is, how it was set up and how busy it is."""
        request = admin_service_pb2.GetServerInfoRequest()
        response = await self._connection.unary(self._connection.admin.GetServerInfo, request)
        return _server_calls.server_info(response.info)

    async def close(self) -> None:
        """Ends all running calls, which raise RequestCancelledError, and the connection."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncAdapters:
    """The adapters of a server: `client.adapters`."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def put(
        self,
        name: str,
        source: AdapterSource,
        *,
        config: AdapterConfig | None = None,
        replace: bool = False,
    ) -> Adapter:
        """Makes an adapter the newest version of a name; its content again changes nothing.

        `source` is a folder with adapter_config.json and adapter_model.safetensors, the path of a
        .safetensors file, or the bytes of one. `config` is the adapter's configuration, a mapping
        or JSON text, where neither the folder nor the file's metadata has it. Without `replace`, a
        name that holds other content raises AlreadyExistsError. What cannot be read raises OSError.
        """
        safetensors, config_json = await asyncio.to_thread(read_source, source, config)
        request = _calls.put_request(name, safetensors, config_json, replace)
        response = await self._connection.unary(self._connection.adapters.PutAdapter, request)
        return _calls.adapter(response.adapter)

    async def get(self, name: str) -> Adapter:
        """Returns the adapter of that name, or raises NotFoundError.

        `name` may say which version: "x@3", "x@sha256:ab12cd34" or "x@alias".
        """
        request = adapter_service_pb2.GetAdapterRequest(name=_calls.check_name(name))
        response = await self._connection.unary(self._connection.adapters.GetAdapter, request)
        return _calls.adapter(response.adapter)

    def __aiter__(self) -> AsyncIterator[Adapter]:
        return self.list()

    async def list(self, name: str | None = None) -> AsyncIterator[Adapter]:
        """Yields all adapters in the order of their names, fetched page by page.

        With a `name`, all versions of it, the newest first.
        """
        request = adapter_service_pb2.ListAdaptersRequest(name=_calls.check_name(name or ""))
        while True:
            page = await self._connection.unary(self._connection.adapters.ListAdapters, request)
            for message in page.adapters:
                yield _calls.adapter(message)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def download(self, name: str) -> bytes:
        """Returns the file of an adapter, a safetensors file that carries its configuration."""
        request = adapter_service_pb2.DownloadAdapterRequest(name=_calls.check_name(name))
        response = await self._connection.unary(self._connection.adapters.DownloadAdapter, request)
        return response.safetensors

    async def set_alias(self, name: str, alias: str, version: int | str) -> Adapter:
        """Points an alias at a version of a name, which it returns.

        `version` is a number, the beginning of a digest, another alias, or "latest" for the newest
        one there is now. An alias that pointed elsewhere is moved in one step.
        """
        request = _calls.alias_request(name, alias, version)
        response = await self._connection.unary(self._connection.adapters.SetAlias, request)
        return _calls.adapter(response.adapter)

    async def delete_alias(self, name: str, alias: str) -> None:
        """Removes an alias; the version stays."""
        request = adapter_service_pb2.DeleteAliasRequest(name=_calls.check_name(name), alias=alias)
        await self._connection.unary(self._connection.adapters.DeleteAlias, request)

    async def delete(self, name: str) -> Adapter:
        """Removes a name, or the version that it says, and returns the newest that is gone.

        Running requests keep it. Raises FailedPreconditionError where an alias points there.
        """
        request = adapter_service_pb2.DeleteAdapterRequest(name=_calls.check_name(name))
        response = await self._connection.unary(self._connection.adapters.DeleteAdapter, request)
        return _calls.adapter(response.adapter)
