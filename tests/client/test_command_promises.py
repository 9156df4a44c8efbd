"""What docs/command.md promises of all commands: exit codes and the keys of JSON."""

import json
import re
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

import redmux
from redmux import _chat_command, _exit_codes
from redmux.v1 import admin_service_pb2 as admin_pb
from redmux.v1 import training_service_pb2 as training_pb

PAGE = (Path(__file__).parents[2] / "docs/command.md").read_text(encoding="utf-8")
TABLES = {
    part.partition("\n")[0]: re.findall(r"^\| (.+) \|$", part, re.M)[1:]
    for part in PAGE.split("\n## ")
}
KEYS = {}
for row in TABLES["JSON"]:
    commands, _, keys = row.split(" | ")
    KEYS[commands] = re.findall(r"`(\w+)`", keys.partition(":")[0].partition(";")[0])


def test_the_page_lists_the_codes_that_there_are():
    told = {int(row.split(" | ")[0]) for row in TABLES["Exit codes"]}
    codes = {code for name, code in vars(_exit_codes).items() if name.isupper() and name[0] != "_"}
    assert told == codes | {0, 70}  # 70 is what serve ends with


CODES = {
    redmux.UnavailableError: 3, redmux.DeadlineExceededError: 3, redmux.NotFoundError: 4,
    redmux.InvalidArgumentError: 5, redmux.UnauthenticatedError: 5,
    redmux.PermissionDeniedError: 5, redmux.AlreadyExistsError: 5,
    redmux.FailedPreconditionError: 5, redmux.ResourceExhaustedError: 5,
    redmux.UnimplementedError: 5, redmux.RedmuxError: 1, redmux.AbortedError: 1,
    redmux.DataLossError: 1, redmux.RequestCancelledError: 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", [redmux.RedmuxError, *redmux.RedmuxError.__subclasses__()])
def test_the_code_tells_why_a_command_failed(run, server, kind):
    server.fail = lambda call, context: context.abort(kind.status, "no")
    code, out, err = run("info")
    assert (code, out) == (CODES[kind], "")
    assert err.startswith("redmux: no")


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "Hi"], ["generate", "--no-stream", "Hi"], ["embed", "Hi"], ["score", "Hi"],
        ["tokenize", "Hi"], ["detokenize", "7"],
        ["classify", "--adapter", "a", "Hi"], ["adapters", "get", "a"], ["adapters", "list"],
        ["adapters", "delete", "a"], ["adapters", "versions", "a"],
        ["adapters", "alias", "a", "b", "1"], ["adapters", "unalias", "a", "b"],
        ["adapters", "download", "a", "there"], ["jobs", "get", "a"], ["jobs", "watch", "a"],
        ["jobs", "cancel", "a"], ["top", "--once"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_command_ends_with_the_code_of_its_error(run, server, command):
    server.fail = lambda call, context: context.abort(grpc.StatusCode.NOT_FOUND, "no")
    code, _, err = run(*command)
    assert (code, err) == (4, "redmux: no\n")


def test_several_adapters_end_with_the_code_of_the_first_that_failed(run, server):
    codes = {"b": grpc.StatusCode.NOT_FOUND, "c": grpc.StatusCode.INVALID_ARGUMENT}

    def fail(call, context):
        if code := codes.get(call.request.generation.adapter):
            context.abort(code, "no")

    server.fail = fail
    for form in ([], ["--no-stream"], ["--json"]):
        assert run("generate", "Hi", *form, "--adapter", "a", "--adapter", "b")[0] == 4
        adapters = ["--adapter", "c", "--adapter", "b", "--adapter", "a"]
        assert run("generate", "Hi", *form, *adapters)[0] == 5


def test_a_server_that_is_not_there_is_code_3(run, server):
    server.stop()
    assert run("health", "--timeout", "5")[0] == 3


def test_a_pipe_that_is_not_text_is_one_line_on_stderr(run, monkeypatch, tmp_path):
    (tmp_path / "latin").write_bytes(b"Gr\xfc\xdfe\n")
    with (tmp_path / "latin").open(encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        code, _, err = run("generate", "-")
    assert code == 1
    assert err.startswith("redmux: 'utf-8' codec can't decode byte 0xfc")


COMMANDS = {
    "`generate`": [["generate", "Hi"]],
    "`score`": [["score", "Hi", "there"]],
    "`tokenize`": [["tokenize", "Hi"]],
    "`detokenize`": [["detokenize", "7"]],
    "`classify`": [["classify", "--adapter", "a", "Hi"]],
    "`embed`": [["embed", "Hi"]],
    "`adapters list`, `versions`, `get`, `put`, `alias`, `delete`": [
        ["adapters", "list"], ["adapters", "versions", "a"], ["adapters", "get", "a"],
        ["adapters", "put", "a", "FILE"], ["adapters", "alias", "a", "prod", "1"],
        ["adapters", "delete", "a"],
    ],
    "`jobs list`, `get`, `create`, `cancel`": [
        ["jobs", "list"], ["jobs", "get", "j"], ["jobs", "create", "a", "DATA"],
        ["jobs", "cancel", "j"],
    ],
    "`jobs watch`": [["jobs", "watch", "j"]],
    "`info`": [["info"]],
    "`health`": [["health"]],
    "`top`": [["top", "--once", "--interval", "0.1"]],
    "`doctor`": [["doctor"]],
    "`version`": [["version"]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("commands", "arguments"),
    [(name, arguments) for name, all_of_it in COMMANDS.items() for arguments in all_of_it],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_json_has_the_keys_that_the_page_promises(run, server, tmp_path, commands, arguments):
    (tmp_path / "a.safetensors").write_bytes(b"vectors")
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    server.adapters["a"] = server.adapter("a")
    server.jobs["j"] = server.job("j", "a")
    server.job_events = []
    server.info = admin_pb.ServerInfo(uptime_s=1, max_running=1, load=admin_pb.Load())
    server.health.set("redmux.v1.InferenceService", health_pb2.HealthCheckResponse.SERVING)
    files = {"FILE": str(tmp_path / "a.safetensors"), "DATA": str(tmp_path / "d.jsonl")}
    if commands == "`jobs watch`":
        server.job_events = [training_pb.WatchJobResponse(job=server.jobs["j"])]
    options = [] if arguments == ["version"] else None
    _, out, err = run(*(files.get(word, word) for word in arguments), "--json", options=options)
    assert err == ""
    (line,) = out.splitlines()
    assert KEYS[commands]
    told = json.loads(line)
    if commands == "`jobs watch`":  # which has those of its event beside it
        told = {"event": told["event"]}
    assert set(KEYS[commands]) == set(told)


def test_the_page_tells_of_every_command_that_prints_json():
    assert set(KEYS) == {*COMMANDS, "`adapters verify`"}


def test_the_page_tells_of_every_line_that_the_chat_takes():
    commands = set(re.findall(r"^(/\w+)", _chat_command._HELP, re.M))
    assert commands == set(re.findall(r"`(/\w+)", PAGE))
