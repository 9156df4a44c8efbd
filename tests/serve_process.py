"""`redmux serve` as a process of its own."""

import asyncio
import os
import re
import subprocess
import sys


class Process:
    """`redmux serve` on free ports; `ready` waits for the line that names them."""

    def __init__(self, *flags, start=("-m", "redmux"), **environ):
        self.start = start
        self.flags = flags
        self.environ = {**os.environ, **environ}
        self.lines = []

    async def __aenter__(self):
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, *self.start, "serve", "--port", "0", "--http-port", "0",
            "--metrics-port", "0", *self.flags, env=self.environ, stderr=subprocess.PIPE,
        )  # fmt: skip
        return self

    async def __aexit__(self, *exc_info):
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()

    async def ready(self):
        return await self.tells(r"serving .* on [^ ]+:(\d+),")

    async def tells(self, pattern):
        """Waits for a line of its log; returns the address of the port that is in it, if any."""
        while line := (await self.process.stderr.readline()).decode():
            self.lines.append(line)
            if found := re.search(pattern, line):
                return f"127.0.0.1:{found[1]}" if found.groups() else None
        raise AssertionError("".join(self.lines))

    async def ended(self):
        text = (await self.process.stderr.read()).decode()
        return await self.process.wait(), "".join(self.lines) + text
