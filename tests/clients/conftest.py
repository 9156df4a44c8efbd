"""A `redmux serve` process of the project's environment; the clients are in this one.

Nothing of redmux is importable here: what the server ought to say is computed by direct.py, with
plain transformers, in the project's environment as well.
"""

import json
import os
import re
import subprocess
import threading
from pathlib import Path

import pytest
from chat_templates import QWEN
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("REDMUX_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
# What the clients would otherwise ask the internet for.
os.environ |= {
    "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "DO_NOT_TRACK": "1", "LANGSMITH_TRACING": "false",
}  # fmt: skip


class Serving:
    """`redmux serve` on free ports, until its HTTP answers; its log is read to the end."""

    def __init__(self, *flags: str) -> None:
        self._process = subprocess.Popen(
            [PYTHON, "-m", "redmux", "serve", "--port", "0", "--http-port", "0",
             "--metrics-port", "0", "--threads", "2", *flags],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        for line in self._process.stderr:
            self.lines.append(line)
            if found := re.search(r"serving .* HTTP on port (\d+),", line):
                break
        else:
            raise AssertionError("".join(self.lines))
        self.url = f"http://127.0.0.1:{found[1]}"
        self._reader = threading.Thread(target=lambda: self.lines.extend(self._process.stderr))
        self._reader.start()

    def stop(self) -> None:
        """Ends the server; its log has to be without tracebacks."""
        self._process.terminate()
        code = self._process.wait(60)
        self._reader.join()
        assert "Traceback" not in "".join(self.lines), "".join(self.lines)
        assert code == 0, "".join(self.lines)


@pytest.fixture(scope="session")
def url():
    """The address of a server of the default model with the bundled adapters."""
    serving = Serving("--adapters", "zoo")
    yield serving.url
    serving.stop()


@pytest.fixture(scope="session")
def direct():
    """Asks direct.py, see there."""

    def direct(**asked):
        done = subprocess.run(
            [PYTHON, str(Path(__file__).with_name("direct.py"))],
            input=json.dumps(asked), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return direct


@pytest.fixture(scope="session")
def tokenizer(direct, tmp_path_factory):
    """The folder of the default model's tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    direct(save_tokenizer=str(folder))
    return folder


@pytest.fixture(scope="session")
def tools_url(tokenizer, tmp_path_factory):
    """The address of a server of the default model with a template that writes tools.

    That of the default model writes none.
    """
    folder = tmp_path_factory.mktemp("tools")
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = QWEN
    loaded.save_pretrained(folder)
    serving = Serving("--tokenizer", str(folder))
    yield serving.url
    serving.stop()
