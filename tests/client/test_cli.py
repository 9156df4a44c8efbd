import io
import json
import re
import signal
import subprocess
import sys
import threading
import types

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2

import redmux
from redmux import cli
from redmux._shell import shell_line
from redmux.cli import main

DIGEST = "sha256:" + "ab" * 32


def fail_for(name, code=grpc.StatusCode.NOT_FOUND):
    def fail(call, context):
        if call.request.generation.adapter == name:
            context.abort(code, f"no adapter '{name}';\n see ListAdapters")

    return fail


def test_generate_streams_the_text(run, server):
    assert run("generate", "Say hello") == (0, "Hello world\n", "")
    assert [call.method for call in server.calls] == ["Generate"]
    generation = server.calls[0].request.generation
    assert (generation.text, generation.adapter) == ("Say hello", "")


def test_generate_prints_chunks_as_they_come(run, server, monkeypatch):
    events = []

    class Output(io.StringIO):
        def write(self, text):
            events.append(text)
            has_written.set()
            return len(text)

    has_written = threading.Event()

    def script(generation, call):
        first, second = server.two_messages(generation, call)
        yield first
        assert has_written.wait(10)
        events.append("second is made")
        yield second

    server.script = script
    monkeypatch.setattr(sys, "stdout", Output())
    assert run("generate", "Hi")[0] == 0
    assert events.index("Hello") < events.index("second is made") < events.index(" world")


def test_generate_without_stream_waits_for_the_whole(run, server):
    assert run("generate", "--no-stream", "Hi") == (0, "Hello world\n", "")
    assert [call.method for call in server.calls] == ["Complete"]


def test_generate_passes_all_options_on(run, server):
    run(
        *("generate", "Hi", "--adapter", "acme/a", "--max-tokens", "5", "--temperature", "0.5"),
        *("--top-p", "0.25", "--top-k", "3", "--seed", "9", "--stop", "x", "--stop", "y"),
        *("--stop-token-id", "2", "--ignore-eos", "--timeout", "9"),
    )
    generation = server.calls[0].request.generation
    sampling, stopping = generation.sampling, generation.stopping
    assert generation.adapter == "acme/a"
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.25)
    assert (sampling.top_k, sampling.seed) == (3, 9)
    assert (stopping.max_tokens, list(stopping.stop)) == (5, ["x", "y"])
    assert (list(stopping.stop_token_ids), stopping.ignore_eos) == ([2], True)
    assert abs(server.calls[0].time_remaining_s - 9) < 4


def test_generate_chat_sends_a_users_message(run, server):
    run("generate", "--chat", "Hi")
    (message,) = server.calls[0].request.generation.chat.messages
    assert (message.role, message.content) == ("user", "Hi")


def test_generate_reads_the_prompt_from_stdin(run, server, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    run("generate", "-")
    assert server.calls[0].request.generation.text == "from a pipe\n"


def test_generate_json_is_the_whole_completion(run):
    code, out, _ = run("generate", "--json", "--logprobs", "--adapter", "acme/a", "Hi")
    assert code == 0
    assert json.loads(out) == {
        "text": "Hello world",
        "token_ids": [7, 8, 9],
        "logprobs": [-0.5, -0.25, -2.0],
        "finish_reason": "stop",
        "stop": "\n",
        "tool_calls": [],
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 3,
            "cached_prompt_tokens": 2,
            "added_special_tokens": 1,
        },
        "adapter": "acme/a",
        "digest": DIGEST,
        "top_logprobs": None,
        "stop_token_id": None,
        "prompt": None,
        "first_token_s": None,
        "total_s": 0.0,
        "other_choices": [],
    }


@pytest.mark.parametrize("form", [[], ["--no-stream"], ["--json"]], ids=str)
def test_generate_runs_several_adapters_at_once(run, server, form):
    all_three = threading.Barrier(3)

    def script(generation, call):
        all_three.wait(10)
        for message in server.two_messages(generation, call):
            message.text = message.text.replace("world", generation.adapter or "base")
            yield message

    server.script = script
    adapters = ["--adapter", "acme/b", "--base", "--adapter", "acme/a"]
    code, out, err = run("generate", *adapters, *form, "Hi")
    assert (code, err) == (0, "")
    if form == ["--json"]:
        texts = [json.loads(line)["text"] for line in out.splitlines()]
        assert texts == ["Hello base", "Hello acme/b", "Hello acme/a"]
    else:
        assert out == (
            "== (base model) ==\nHello base\n== acme/b ==\nHello acme/b\n"
            "== acme/a ==\nHello acme/a\n"
        )


@pytest.mark.parametrize("form", [[], ["--no-stream"]], ids=str)
def test_one_failing_adapter_does_not_disturb_the_others(run, server, form):
    server.fail = fail_for("acme/none")
    code, out, err = run("generate", "--adapter", "acme/none", "--adapter", "acme/a", *form, "Hi")
    assert code == 4
    assert out.endswith("== acme/a ==\nHello world\n")
    assert err == "redmux: acme/none: no adapter 'acme/none'; see `redmux adapters list`\n"


SCHEMA = '{"type": "object"}'


@pytest.mark.parametrize(
    ("flags", "kind", "value"),
    [
        (["--schema", "file"], "json_schema", SCHEMA),
        (["--json-object"], "json_object", True),
        (["--regex", "a+"], "regex", "a+"),
        (["--grammar", "file"], "lark", SCHEMA),
    ],
)
def test_generate_says_what_the_completion_has_to_look_like(
    run, server, tmp_path, monkeypatch, flags, kind, value
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text(SCHEMA, encoding="utf-8-sig")  # as editors of Windows write it
    assert run("generate", "Hi", *flags)[0] == 0
    grammar = server.calls[-1].request.generation.grammar
    assert (grammar.WhichOneof("kind"), getattr(grammar, kind)) == (kind, value)


def test_generate_takes_one_of_several_texts(run, server):
    assert run("generate", "Hi", "--choice", "yes", "--choice", "no")[0] == 0
    assert list(server.calls[-1].request.generation.grammar.choices.texts) == ["yes", "no"]
    assert run("generate", "Hi")[0] == 0
    assert not server.calls[-1].request.generation.HasField("grammar")


def test_generate_takes_one_way_of_saying_what_the_completion_looks_like(run, server):
    code, _, err = run("generate", "Hi", "--regex", "a", "--json-object")
    assert code == 2
    assert "--json-object: not allowed with argument --regex" in err
    assert not server.calls


def test_a_grammar_that_cannot_be_read_is_named(run, server, tmp_path):
    path = tmp_path / "grammar"
    code, _, err = run("generate", "Hi", "--grammar", str(path))
    assert (code, err) == (1, f"redmux: cannot open {path}: No such file or directory\n")
    path.write_bytes(b"ab\xff")
    code, _, err = run("generate", "Hi", "--schema", str(path))
    assert (code, err) == (5, f"redmux: {path} is not UTF-8 at byte 2\n")
    assert not server.calls


def test_an_error_is_one_line_on_stderr(run, server):
    server.fail = fail_for("acme/none")
    code, out, err = run("generate", "--adapter", "acme/none", "Hi")
    assert (code, err) == (4, "redmux: no adapter 'acme/none'; see `redmux adapters list`\n")
    assert out == ""


def test_a_file_that_cannot_be_read_is_named_without_its_error_number(run, tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    code, _, err = run("adapters", "put", "acme/a", str(tmp_path))
    path = tmp_path / "adapter_config.json"
    assert (code, err) == (1, f"redmux: cannot open {path}: No such file or directory\n")


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("use Classify or Embed", "use `redmux classify` or `redmux embed`"),
        ("use Generate or Complete", "use `redmux generate`"),
        ("exists; pass replace to replace it", "exists; pass --replace to replace it"),
        ("give continuations or prompt_logprobs", "give continuations or --prompt-logprobs"),
        ("no adapter 'Score'; is 'top_k' meant?", "no adapter 'Score'; is 'top_k' meant?"),
        ("the key's jobs:\n ListJobs", "the key's jobs: `redmux jobs list`"),
    ],
)
def test_errors_name_commands_and_flags_instead_of_calls_and_arguments(run, server, message, told):
    server.fail = lambda call, context: context.abort(grpc.StatusCode.NOT_FOUND, message)
    for command in ("generate", "embed", "classify"):
        code, _, err = run(command, "Hi", *(["--adapter", "a"] if command == "classify" else []))
        assert (code, err) == (4, f"redmux: {told}\n")
    assert run("info")[::2] == (4, f"redmux: {told}\n")


def test_every_option_of_generate_is_called_by_its_flag_in_errors():
    (commands,) = cli.command_parser()._subparsers._group_actions
    flags = {
        flag for action in commands.choices["generate"]._actions for flag in action.option_strings
    }
    for name in redmux.types.GenerationOptions.__annotations__:
        flag = "--" + name.replace("_", "-")
        if "_" in name and flag in flags:
            assert shell_line(f"{name} is 3") == f"{flag} is 3"
    assert shell_line("json_schema is no JSON") == "--schema is no JSON"
    assert shell_line("lark: no start rule") == "--grammar: no start rule"


def test_a_limit_that_passed_names_the_flag_that_sets_it(run, server, target):
    server.script = server.first_then_silence
    code, _, err = run("generate", "--no-stream", "Hi", "--timeout", "0.25")
    assert (code, err) == (
        3, f"redmux: no whole answer from {target} within 0.25 s; --timeout sets the limit\n",
    )  # fmt: skip


def test_a_failed_handshake_is_the_one_line_on_stderr(target):
    command = [sys.executable, "-m", "redmux", "info", "--tls", "--target", target]
    done = subprocess.run(command, capture_output=True, timeout=60, text=True)
    assert done.returncode == 3
    assert done.stderr == f"redmux: the server at {target} speaks no TLS; leave out --tls\n"


def test_adapters_put_get_list_and_delete(run, server, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"vectors")
    (tmp_path / "c.json").write_text("{}")
    source, config = str(tmp_path / "a.safetensors"), str(tmp_path / "c.json")

    code, out, _ = run("adapters", "put", "acme/a", source, "--config", config, "--replace")
    assert code == 0
    assert f"digest: {DIGEST}\n" in out
    request = server.calls[-1].request
    assert (request.safetensors, request.config_json, request.replace) == (b"vectors", "{}", True)

    code, out, _ = run("adapters", "get", "acme/a")
    assert code == 0
    assert "created_at: 2026-01-02T03:04:05+00:00\n" in out

    code, out, _ = run("adapters", "list")
    assert code == 0
    heading, row = out.splitlines()
    assert heading.split()[:5] == ["NAME", "VERSION", "ALIASES", "DIGEST", "BASE"]
    assert row.split()[:5] == ["acme/a", "3", "next,prod=2", "sha256:abababababab", "same"]

    code, out, _ = run("adapters", "delete", "acme/a")
    assert code == 0
    assert "name: acme/a\n" in out
    assert server.adapters == {}


def test_adapters_versions_lists_those_of_one_name(run, server):
    server.adapters["acme/a"] = server.adapter("acme/a")
    code, out, _ = run("adapters", "versions", "acme/a")
    assert (code, server.calls[-1].request.name) == (0, "acme/a")
    assert out.splitlines()[1].split()[:2] == ["acme/a", "3"]


def test_adapters_alias_and_unalias_move_and_remove_an_alias(run, server):
    server.adapters["acme/a"] = server.adapter("acme/a")
    code, out, _ = run("adapters", "alias", "acme/a", "prod", "3")
    assert (code, server.aliases) == (0, {("acme/a", "prod"): "3"})
    assert "version: 3\n" in out
    assert "aliases: next=3, prod=2\n" in out
    assert run("adapters", "unalias", "acme/a", "prod")[0] == 0
    assert server.aliases == {}


def test_adapters_download_writes_a_new_file_and_overwrites_none(run, server, tmp_path):
    server.adapters["acme/a"] = server.adapter("acme/a")
    path = tmp_path / "a.safetensors"
    assert run("adapters", "download", "acme/a", str(path))[0] == 0
    assert path.read_bytes() == b"vectors"
    code, _, err = run("adapters", "download", "acme/a", str(path))
    assert (code, len(server.seen("DownloadAdapter"))) == (1, 1)
    assert "is there already" in err


def sealed(owner):
    header = json.dumps({"__metadata__": {"owner": owner}}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize("removes", [False, True])
def test_adapters_import_publishes_the_files_of_a_folder_under_their_paths(
    removes, run, server, tmp_path
):
    (tmp_path / "team").mkdir()
    files = {"a": b"vectors", "team/b": sealed(""), "theirs": sealed("key-1234")}
    for name, data in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    (tmp_path / "notes.txt").write_text("not an adapter")
    code, out, err = run("adapters", "import", str(tmp_path), *["--remove"] * removes)
    assert code == 1
    assert sorted(server.adapters) == ["a", "team/b"]
    assert [line.split()[0] for line in out.splitlines()] == ["a@3", "team/b@3"]
    assert "theirs.safetensors: it belongs to the key key-1234; put it with that key" in err
    assert err.endswith("2 imported, 1 left\n")
    left = sorted(path.stem for path in tmp_path.rglob("*.safetensors"))
    assert left == (["theirs"] if removes else ["a", "b", "theirs"])


def test_adapters_import_ends_where_the_server_does_not_take_any(run, server, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(b"vectors")
    server.fail = lambda call, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "no key")
    code, _, err = run("adapters", "import", str(tmp_path))
    assert (code, len(server.calls)) == (5, 1)
    assert err.startswith("redmux: no key;")


@pytest.mark.parametrize("verb", [["list"], ["get", "acme/a"], ["delete", "acme/a"]], ids=str)
def test_adapters_print_json(run, server, verb):
    server.adapters["acme/a"] = server.adapter("acme/a")
    code, out, _ = run("adapters", *verb, "--json")
    assert code == 0
    printed = json.loads(out)
    assert (printed["name"], printed["created_at"]) == ("acme/a", "2026-01-02T03:04:05+00:00")


def test_a_file_that_is_not_there_is_one_line_on_stderr(run, tmp_path):
    code, out, err = run("adapters", "put", "acme/a", str(tmp_path / "none.safetensors"))
    assert (code, out) == (1, "")
    assert err.startswith("redmux: ")
    assert "none.safetensors" in err
    assert err.count("\n") == 1


def test_info_prints_every_field(run, server):
    server.info.model = "SmolLM2"
    server.info.choices.extend(["cpu: no accelerator", "float32: exact"])
    code, out, _ = run("info")
    assert code == 0
    assert "model: SmolLM2\n" in out
    assert "choices: cpu: no accelerator; float32: exact\n" in out
    code, out, _ = run("info", "--json")
    assert json.loads(out)["choices"] == ["cpu: no accelerator", "float32: exact"]


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (health_pb2.HealthCheckResponse.SERVING, 0, "serving"),
        (health_pb2.HealthCheckResponse.NOT_SERVING, 1, "not_serving"),
    ],
)
def test_health_tells_by_its_exit_code(run, server, status, code, text):
    server.health.set("redmux.v1.InferenceService", status)
    assert run("health") == (code, f"{text}\n", "")
    assert run("health", "--json") == (code, f'{{"health": "{text}"}}\n', "")


def test_target_and_key_come_from_the_environment(run, server, target, monkeypatch):
    monkeypatch.setenv("REDMUX_TARGET", target)
    monkeypatch.setenv("REDMUX_API_KEY", "s3cret")
    assert run("info", options=[])[0] == 0
    assert server.calls[-1].metadata["authorization"] == "Bearer s3cret"
    assert run("generate", "Hi", options=["--api-key", "other"])[0] == 0
    assert server.calls[-1].metadata["authorization"] == "Bearer other"


def test_ca_uses_tls(run, serve, server, tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate = authority.issue_cert("localhost")
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    pair = (certificate.private_key_pem.bytes(), chain)
    target = serve(server, grpc.ssl_server_credentials([pair]))
    options = ["--target", target, "--ca", str(tmp_path / "ca.pem")]
    assert run("info", options=options)[0] == 0
    assert run("generate", "Hi", options=options)[:2] == (0, "Hello world\n")


@pytest.mark.parametrize("arguments", [[], ["adapters"], ["jobs"]], ids=str)
def test_a_command_without_its_verb_prints_its_help(arguments, capsys):
    assert main(arguments) == 0
    bare = capsys.readouterr()
    assert main([*arguments, "--help"]) == 0
    assert bare == capsys.readouterr()


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["generate"],
        ["generate", "Hi", "--max-tokens", "many"],
        ["generate", "Hi", "--no-such-option"],
        ["adapters", "put", "acme/a"],
    ],
    ids=str,
)
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    assert main(arguments) == 2
    assert "usage: redmux" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["version"], ["--version"]], ids=str)
def test_version_is_that_of_the_package(arguments, capsys):
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"redmux {redmux.__version__}\n"


def test_the_version_is_json_if_wanted(capsys):
    assert main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"version": redmux.__version__}


def test_offline_verbs_are_those_of_their_own_command(capsys):
    parser = pytest.importorskip("redmux_adapters.cli").command_parser()
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    verbs = set(re.findall(r"^    (\w+) ", capsys.readouterr().out, re.M))
    assert verbs == set(cli._OFFLINE_VERBS)


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in (
        "serve", "bench", "train", "generate", "adapters", "info", "health", "version",
        "chat", "top", "doctor", "completion", "warm-up",
    ):  # fmt: skip
        assert re.search(rf"^    {command}\s", out, re.M)
    assert main(["adapters", "--help"]) == 0
    out = capsys.readouterr().out
    for command in ("list", "get", "put", "delete", "create", "convert", "show", "verify"):
        assert f"    {command} " in out


@pytest.mark.parametrize(
    ("arguments", "module", "function", "extra", "rest"),
    [
        (["serve", "--model", "x"], "redmux_server.cli", "serve", "server", ["--model", "x"]),
        (["bench", "sweep", "-h"], "redmux_bench.cli", "main", "bench", ["sweep", "-h"]),
        (["train", "d.csv"], "redmux_adapters.train.cli", "main", "train", ["d.csv"]),
        (
            ["adapters", "show", "--x", "f"],
            "redmux_adapters.cli",
            "main",
            "adapters",
            ["show", "--x", "f"],
        ),
        (["adapters", "stamp", "f"], "redmux_adapters.cli", "main", "adapters", ["stamp", "f"]),
        (["adapters", "create", "-h"], "redmux_adapters.cli", "main", "adapters", ["create", "-h"]),
        (["adapters", "convert"], "redmux_adapters.cli", "main", "adapters", ["convert"]),
        (["adapters", "verify", "f"], "redmux_adapters.cli", "main", "adapters", ["verify", "f"]),
    ],
    ids=str,
)
def test_tools_of_the_extras_parse_their_own_arguments(
    monkeypatch, capsys, arguments, module, function, extra, rest
):
    seen = []

    def tool(argv):
        seen.append(argv)
        return 7

    parent = types.ModuleType(module.partition(".")[0])
    child = types.ModuleType(module)
    setattr(child, function, tool)
    monkeypatch.setitem(sys.modules, parent.__name__, parent)
    monkeypatch.setitem(sys.modules, module, child)
    assert main(arguments) == 7
    assert seen == [rest]

    monkeypatch.setitem(sys.modules, module, None)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert f"pip install 'redmux[{extra}]'" in err
    assert "in a checkout: pip install . " in err
    assert err.count("\n") == 1


@pytest.fixture
def heeded_sigint():
    """Lets children start with SIGINT heeded, which shells let jobs in the background ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_sigint")
def test_ctrl_c_is_exit_code_130_and_cancels_on_the_server(server, target, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    server.script = server.first_then_silence
    command = [sys.executable, "-m", "redmux", "generate", "Hi", "--target", target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(5) == b"Hello"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == b""
    assert server.calls[0].has_ended.wait(10)


def test_a_reader_that_goes_away_is_no_traceback(server, target):
    server.info.model = "x" * 1_000_000
    command = [sys.executable, "-m", "redmux", "info", "--target", target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait(20) == 141
        assert process.stderr.read() == b""
