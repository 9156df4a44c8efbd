"""Runs one prompt with several adapters at once and prints the completions one below the other."""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from redmux._exit_codes import exit_code
from redmux._printing import json_line
from redmux._shell import shell_line
from redmux.aio import AsyncClient
from redmux.errors import RedmuxError
from redmux.mixes import Mix
from redmux.types import Chunk, GenerationOptions, Prompt


@dataclass(frozen=True, slots=True)
class SideBySide:
    """One prompt for several adapters, of which None is the base model.

    All requests run at the same time, so that the server may compute them in the same batches;
    their texts are printed in the order of `adapters`. What fails is reported on stderr and does
    not disturb the rest.
    """

    client: AsyncClient
    prompt: Prompt
    adapters: Sequence[str | Mix | None]
    options: GenerationOptions
    timeout_s: float | None

    async def print_streams(self) -> int:
        """Prints every text as it is decoded and returns the exit code."""
        queues: list[asyncio.Queue[Chunk | RedmuxError | None]] = [
            asyncio.Queue() for _ in self.adapters
        ]
        tasks = [
            asyncio.create_task(self._fill(queue, adapter))
            for queue, adapter in zip(queues, self.adapters, strict=True)
        ]
        code = 0  # of the first that failed
        try:
            for queue, adapter in zip(queues, self.adapters, strict=True):
                self._print_heading(adapter)
                num_chunks = 0
                while isinstance(item := await queue.get(), Chunk):
                    print(item.text, end="", flush=True)
                    num_chunks += 1
                if num_chunks or item is None:
                    print()
                if item is not None:
                    self._report(adapter, item)
                    code = code or exit_code(item)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return code

    async def _fill(
        self, queue: asyncio.Queue[Chunk | RedmuxError | None], adapter: str | Mix | None
    ) -> None:
        """Puts all chunks into the queue, then None or the error that ended them."""
        try:
            stream = self.client.stream(
                self.prompt, timeout_s=self.timeout_s, **self._options(adapter)
            )
            async with aclosing(stream) as chunks:
                async for chunk in chunks:
                    queue.put_nowait(chunk)
        except RedmuxError as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    async def print_completions(self, as_json: bool) -> int:
        """Prints all completions once they are whole, as text or one JSON object each."""
        calls = (
            self.client.generate(self.prompt, timeout_s=self.timeout_s, **self._options(adapter))
            for adapter in self.adapters
        )
        results = await asyncio.gather(*calls, return_exceptions=True)
        code = 0  # of the first that failed
        for adapter, result in zip(self.adapters, results, strict=True):
            if isinstance(result, RedmuxError):
                self._report(adapter, result)
                code = code or exit_code(result)
            elif isinstance(result, BaseException):
                raise result
            elif as_json:
                print(json_line(result))
            else:
                self._print_heading(adapter)
                print(result.text)
        return code

    def _options(self, adapter: str | Mix | None) -> GenerationOptions:
        options = self.options.copy()
        options["adapter"] = adapter
        if adapter is None:
            options.pop("apply", None)  # there is nothing to apply
        return options

    def _print_heading(self, adapter: str | Mix | None) -> None:
        if len(self.adapters) > 1:
            print(f"== {_title(adapter)} ==")

    def _report(self, adapter: str | Mix | None, error: RedmuxError) -> None:
        where = f"{_title(adapter)}: " if len(self.adapters) > 1 else ""
        print(f"redmux: {where}{shell_line(error.message)}", file=sys.stderr)


def _title(adapter: str | Mix | None) -> str:
    return "(base model)" if adapter is None else str(adapter)
