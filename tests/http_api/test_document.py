"""What docs/http.md shows, on a server."""

import asyncio
import re
import shlex
import shutil
from pathlib import Path

import pytest

from redmux_adapters import to_bytes

DOCUMENT = (Path(__file__).parents[2] / "docs" / "http.md").read_text()


async def test_the_python_of_the_document_runs(url, base, put, capsys):
    for name, seed in (("pirate", 1), ("assistant-json", 2)):
        await put(name, base.adapter(seed))
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    code = code.replace("http://localhost:8000", url)
    await asyncio.to_thread(exec, code, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("pirate ")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not there")
async def test_the_calls_of_curl_in_the_document_are_answered(url, base, put, tmp_path):
    await put("pirate", base.adapter(1))
    (tmp_path / "pirate.safetensors").write_bytes(to_bytes(base.adapter(3)))
    text = DOCUMENT.replace("\\\n", " ").replace("http://localhost:8000", url)
    calls = re.findall(r"^    (curl .*)$", text.replace("smollm2", "tiny"), re.MULTILINE)
    assert len(calls) == 3
    for call in calls:
        process = await asyncio.create_subprocess_exec(
            *shlex.split(call), "--silent", "--show-error", "--fail", cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, _ = await process.communicate()
        assert process.returncode == 0, call
        assert b'"redmux"' in out or b'"digest"' in out


def test_every_field_is_in_the_document():
    from redmux_server.http_api.schemas import chat, completion, response

    for model in (completion.CompletionBody, chat.ChatBody, response.ResponseBody):
        for name in sorted(model.no_effect):
            assert f"`{name}`" in DOCUMENT, name
    for model in (completion.CompletionBody, chat.ChatBody):
        for name in sorted(set(model.model_fields) - {"prompt", "messages", "model"}):
            assert f"`{name}`" in DOCUMENT, name
