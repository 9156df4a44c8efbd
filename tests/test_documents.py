"""Every block of code in README and docs is run, or checked as far as it can be, and links lead on.

What is not run has its reason in `NOT_RUN`.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import re
import shlex
import shutil
import subprocess
import threading
import tomllib

import pytest
from chat_templates import QWEN, tokenizer_of
from conftest import load_reference
from documents import PAGES, ROOT, anchors, blocks, commands
from google.protobuf import json_format
from tokenizers_at_hand import save_model_with

from redmux import Client, cli
from redmux._completion_command import whole_parser
from redmux.v1 import inference_service_pb2
from redmux_adapters import to_bytes, write_folder
from redmux_adapters.train.job import read_job

ADAPTERS = ("pirate", "assistant-json", "booking")
BLOCKS = list(blocks())
# Page and beginning of a block -> why it is not run.
NOT_RUN = {
    ("docs/api.md", ""): "signatures, which tests/test_api_page.py compares with the code",
    ("docs/chat.md", "(ToolCall"): "output of a model that calls tools",
    ("docs/encoders.md", ""): "tests/e2e/test_readings.py runs it on an encoder",
    ("docs/fine_tuning.md", ""): "tests/http_api/test_fine_tuning.py runs it: minutes of training",
    ("docs/format.md", ""): "a formula, and parts of a file, which tests/adapters/ hold",
    ("docs/operating.md", "# one key a line"): "a file of keys",
    ("docs/structure.md", ""): "a tree of folders",
    ("docs/training.md", "redmux train: 2"): "output",
    ("README.md", "Aye"): "output, which tests/e2e/test_real_model.py holds",
}


# Minutes on a busy machine: run by `make test-slow`.
SLOW = {("docs/training.md", "from redmux import Client, TrainingTask")}


def kept(language):
    """The blocks of a language that are to be run or checked."""
    found = []
    for block in BLOCKS:
        if block.language == language and not reason(block):
            is_slow = (block.page, block.text.partition("\n")[0]) in SLOW
            marks = [pytest.mark.slow, pytest.mark.timeout(600)] if is_slow else []
            found.append(pytest.param(block, id=str(block)[:60], marks=marks))
    return found


def reason(block):
    """Why a block is not run, None where it is; a shell's are always checked."""
    for (page, beginning), why in NOT_RUN.items():
        is_command = block.language == "sh" or re.match(r"(\$ )?redmux [a-z]+ ", block.text)
        if block.page == page and block.text.startswith(beginning) and not is_command:
            return why
    return None


def test_every_block_is_of_a_language_that_is_checked():
    assert {block.language for block in BLOCKS if not reason(block)} == {"", "sh", "python", "toml"}
    for page, beginning in NOT_RUN:
        assert any(b.page == page and b.text.startswith(beginning) for b in BLOCKS), (
            page,
            beginning,
        )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model whose template writes tools."""
    folder = save_model_with(tokenizer_of(QWEN), tmp_path_factory.mktemp("documents"), 1024)
    return load_reference(folder)


@contextlib.contextmanager
def running(config):
    """A server in a thread of its own, so that a document's code may wait as it likes."""
    from redmux_server.app import Server

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        server = asyncio.run_coroutine_threadsafe(Server.start(config), loop).result(120)
        yield server
        asyncio.run_coroutine_threadsafe(server.stop(drain_s=0), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def server(base):
    from redmux_server.config import ServerConfig

    config = ServerConfig(
        model=str(base.folder), port=0, http_port=0, metrics_port=0, threads=2,
        served_model_name=("smollm2",), max_context=400,
    )  # fmt: skip
    with running(config) as server:
        with Client(f"127.0.0.1:{server.port}") as client:
            for seed, name in enumerate(ADAPTERS):
                client.adapters.put(name, to_bytes(base.adapter(seed)))
        yield server


@pytest.fixture
def here(base, tmp_path, monkeypatch):
    """The folder that the code runs in, with the files that it names."""
    monkeypatch.chdir(tmp_path)
    write_folder(base.adapter(7), "my-adapter")
    for name in ("my-adapter", "pirate"):
        (tmp_path / f"{name}.safetensors").write_bytes(to_bytes(base.adapter(8)))
    return tmp_path


def placed(text, server, base):
    """The code, for the server at hand and its small model."""
    for told, there in (
        ("localhost:50051", f"127.0.0.1:{server.port}"),
        ("localhost:8000", f"127.0.0.1:{server.http_port}"),
        ("localhost:9095", f"127.0.0.1:{server.metrics_port}"),
        ("Client()", f'Client("127.0.0.1:{server.port}")'),
        ('load_training_base("smollm2"', f'load_training_base("{base.folder}"'),
        ('"steps": 200', '"steps": 2'),
        ("steps=100", "steps=2"),
    ):
        text = text.replace(told, there)
    if "max_tokens" not in text:  # a random model comes to no end by itself
        text = text.replace("completions.create(", "completions.create(max_tokens=8, ")
        text = text.replace('"messages": ', '"max_tokens": 8, "messages": ')
    return text


@pytest.mark.parametrize("block", kept("python"))
def test_python_runs(server, base, here, block, capsys):
    exec(compile(placed(block.text, server, base), block.page, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("block", kept("toml"))
def test_toml_is_taken(here, block):
    (here / "file.toml").write_text(block.text)
    values = tomllib.loads(block.text)
    if "tasks" in values:
        assert [task.name for task in read_job("file.toml", {}).tasks]
    else:
        from redmux_server.config import load_config

        config = load_config(["--config", "file.toml"], {})
        for name, value in values.items():
            given = getattr(config, name)
            assert (list(given) if isinstance(value, list) else given) == value


SHELL = [
    pytest.param(block, command, id=f"{block.page}: {command[:50]}")
    for block in BLOCKS
    if block.language in ("", "sh") and not reason(block)
    for command in commands(block)
]


@pytest.mark.parametrize(("block", "command"), SHELL)
def test_commands_and_their_options_exist(block, command):
    words = shlex.split(re.sub(r"(?<= )[>|&](?= |$).*|[\[\]]", "", command), comments=True)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    program, *arguments = words
    CHECKS[program.rpartition("/")[2]](arguments)


def check_redmux(arguments):
    with contextlib.suppress(AskedForHelp):
        parser().parse_args(arguments)


class AskedForHelp(Exception):
    """A parser has shown its help."""


@functools.cache
def parser():
    parser = whole_parser()
    stack = [parser]
    while stack:
        one = stack.pop()
        one.error = refuse
        one.print_help = asked
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                stack += action.choices.values()
    return parser


def refuse(message):
    raise AssertionError(message)


def asked(*_):
    raise AskedForHelp


def check_make(arguments):
    for target in arguments:
        if "=" not in target:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


def check_pip(arguments):
    assert arguments.pop(0) == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in arguments:
        name, _, extra = word.removeprefix("--no-deps").replace("]", "").partition("[")
        if name == "redmux" and extra:
            assert extra in project["optional-dependencies"]


def check_python(arguments):
    """The names of a script's options are in it, or in one beside it."""
    script, *rest = arguments
    near = "".join(path.read_text() for path in (ROOT / script).parent.glob("*.py"))
    assert (ROOT / script).is_file()
    for option in rest:
        name = option.removeprefix("--")
        assert name == option or f'"{option}"' in near or f'"{name}"' in near, option


def check_docker(arguments):
    assert (ROOT / "Dockerfile").is_file()
    if arguments[0] == "run":
        check_redmux(["serve", *arguments[arguments.index("redmux") + 1 :]])


def check_grpcurl(arguments):
    service, _, call = arguments[-1].rpartition("/")
    services = inference_service_pb2.DESCRIPTOR.services_by_name
    method = services[service.rpartition(".")[2]].methods_by_name[call]
    message = getattr(inference_service_pb2, method.input_type.name)()
    json_format.ParseDict(json.loads(arguments[arguments.index("-d") + 1]), message)


CHECKS = {
    "redmux": check_redmux, "make": check_make, "pip": check_pip, "python": check_python,
    "docker": check_docker, "grpcurl": check_grpcurl,
    "curl": lambda arguments: None,  # it is run below
    "head": lambda arguments: None,
}  # fmt: skip

# Those that ask a server, need nothing else and end by themselves; the bounds keep them short.
ASKING = re.compile(
    r"(\.venv/bin/)?redmux (generate|score|health|info|adapters (put|list|get|delete)) ?"
)


@pytest.mark.parametrize(
    "block", [block for block in kept("sh") if ASKING.search(block.values[0].text)]
)
def test_commands_that_ask_a_server_are_answered(server, here, block, capsys):
    for command in commands(block):
        if ASKING.match(command):
            arguments = shlex.split(command)[1:]
            if arguments[0] == "generate":
                arguments += ["--max-tokens", "4"]
            assert cli.main([*arguments, "--target", f"127.0.0.1:{server.port}"]) == 0, command
            assert capsys.readouterr().out.strip(), command


CURLS = [(block, c) for block, c in (p.values for p in SHELL) if c.startswith("curl ")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not there")
@pytest.mark.parametrize(("block", "command"), CURLS, ids=lambda value: str(value)[:50])
def test_calls_of_curl_are_answered(server, base, here, block, command):
    words = shlex.split(placed(command, server, base))
    done = subprocess.run(
        [*words, "--silent", "--show-error", "--fail"], capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if {"-d", "-T"} & {*words}:
        assert b'"redmux"' in done.stdout or b'"digest"' in done.stdout


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_anchors_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        target, _, anchor = link.partition("#")
        file = path.parent / target if target else path
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_every_page_is_in_the_navigation_of_the_site():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = text.partition("\nnav:\n")[2]
    for path in ROOT.glob("docs/*.md"):
        assert f": {path.name}\n" in nav


def test_what_a_page_of_the_site_links_to_is_on_the_site():
    """As far as it is a page: `make docs` refuses others, and needs mkdocs for that."""
    hooks = (ROOT / "docs" / "site_hooks.py").read_text(encoding="utf-8")
    listed = hooks.partition("OUTSIDE = (")[2].partition("\n)\n")[0]
    outside = {ROOT / path for path in re.findall(r'^    "(.+\.md)",$', listed, re.M)}
    zoo = ROOT.glob("adapters/redmux_adapters/zoo/**/README.md")
    pages = {*ROOT.glob("docs/*.md"), *outside, *zoo}
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for link in re.findall(r"\]\((?!http)([^)#]+\.md)(?:#[^)]*)?\)", text):
            assert (page.parent / link).resolve() in pages, f"{page.relative_to(ROOT)}: {link}"
