import io
import json
import stat

import grpc
import pytest


@pytest.fixture
def say(run, monkeypatch):
    """Runs the chat with lines on stdin; returns its exit code, stdout and stderr."""

    def say(*lines, options=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", *options)

    return say


def turns(call):
    return [(m.role, m.content) for m in call.request.generation.chat.messages]


def refuse(name, code=grpc.StatusCode.NOT_FOUND):
    def fail(call, context):
        if call.method == "Generate" and call.request.generation.adapter == name:
            context.abort(code, f"no adapter '{name}'; see ListAdapters")

    return fail


def test_a_line_of_a_pipe_is_answered_with_a_line_and_with_all_before_it(say, server):
    assert say("Hi", "", "And?") == (0, "Hello world\nHello world\n", "")
    assert turns(server.calls[0]) == [("user", "Hi")]
    assert turns(server.calls[1]) == [
        ("user", "Hi"), ("assistant", "Hello world"), ("user", "And?"),
    ]  # fmt: skip


def test_options_go_with_every_answer(say, server):
    server.adapters["a"] = server.adapter("a")
    options = ["--adapter", "a", "--system", "Be brief.", "--max-tokens", "5", "--seed", "7"]
    options += ["--temperature", "0.5", "--top-p", "0.25", "--top-k", "3"]
    say("Hi", "And?", options=options)
    for call in server.seen("Generate"):
        generation = call.request.generation
        assert turns(call)[0] == ("system", "Be brief.")
        assert (generation.adapter, generation.stopping.max_tokens) == ("a", 5)
        sampling = generation.sampling
        assert (sampling.temperature, sampling.top_p) == (0.5, 0.25)
        assert (sampling.top_k, sampling.seed) == (3, 7)


def test_the_adapter_changes_and_the_base_model_comes_back(say, server):
    server.adapters["acme/a"] = server.adapter("acme/a")
    code, _, err = say("/adapter acme/a", "Hi", "/adapter", "Hi", "/adapter sha256:00", "Hi")
    assert (code, err) == (
        0,
        "answers come from acme/a\nanswers come from the base model\nanswers come from sha256:00\n",
    )
    names = [call.request.generation.adapter for call in server.seen("Generate")]
    assert names == ["acme/a", "", "sha256:00"]


def test_an_adapter_that_is_not_there_is_told_and_the_last_one_stays(say, server):
    server.adapters["acme/a"] = server.adapter("acme/a")
    code, out, err = say("/adapter acme/none", "Hi", options=["--adapter", "acme/a"])
    assert (code, out) == (4, "Hello world\n")
    assert err == "redmux: no adapter 'acme/none'\n"
    assert server.seen("Generate")[0].request.generation.adapter == "acme/a"


def test_an_adapter_that_is_not_there_ends_a_chat_before_it_begins(say, server):
    assert say("Hi", options=["--adapter", "none"]) == (4, "", "redmux: no adapter 'none'\n")
    assert server.seen("Generate") == []
    assert say("Hi", options=["--adapter", "sha256:00"])[0] == 0


def test_a_question_that_fails_is_forgotten_and_the_chat_goes_on(say, server):
    server.fail = refuse("gone")
    server.adapters["gone"] = server.adapter("gone")
    code, out, err = say("Hi", "/adapter gone", "lost", "/adapter", "And?")
    assert (code, out) == (4, "Hello world\nHello world\n")
    assert "redmux: no adapter 'gone'; see `redmux adapters list`\n" in err
    assert turns(server.seen("Generate")[-1]) == [
        ("user", "Hi"), ("assistant", "Hello world"), ("user", "And?"),
    ]  # fmt: skip


def test_a_system_prompt_is_set_and_taken_back(say, server):
    say("/system Rhyme, always.", "Hi", "/system", "Hi")
    assert turns(server.calls[0])[0] == ("system", "Rhyme, always.")
    assert {role for role, _ in turns(server.calls[1])} == {"user", "assistant"}


def test_reset_forgets_the_turns_and_keeps_the_system_prompt(say, server):
    say("Hi", "/reset", "Anew", options=["--system", "Rhyme."])
    assert turns(server.calls[1]) == [("system", "Rhyme."), ("user", "Anew")]


def test_save_writes_messages_and_what_made_the_answers(say, server, tmp_path):
    server.adapters["a"] = server.adapter("a")
    path = tmp_path / "chat ü.json"
    path.write_text("before")
    code, _, err = say("Grüße", f"/save {path}", options=["--adapter", "a", "--system", "S"])
    assert (code, err) == (0, f"saved to {path}\n")
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "adapter": "a",
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Grüße"},
            {"role": "assistant", "content": "Hello world"},
        ],
        "answers": [
            {"adapter": "a", "digest": "sha256:" + "ab" * 32, "finish_reason": "stop"},
        ],
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_file_that_cannot_be_written_is_told_and_what_was_there_stays(say, tmp_path, monkeypatch):
    path = tmp_path / "chat.json"
    path.write_text("before")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, out, err = say("Hi", f"/save {path}", "/save /none/x.json", "And?")
    assert (code, out) == (1, "Hello world\nHello world\n")
    first, second = err.splitlines()
    assert "No space left on device" in first
    assert "/none" in second
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["chat.json"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/nonsense", "redmux: there is no /nonsense; /help tells the commands\n"),
        ("/", "redmux: there is no /; /help tells the commands\n"),
        ("/save", "redmux: /save needs the name of a file\n"),
    ],
)
def test_a_wrong_command_is_told_and_sent_to_nobody(say, server, line, told):
    assert say(line) == (2, "", told)
    assert not server.calls


def test_two_slashes_begin_a_message_with_one(say, server):
    say("//etc is what?")
    assert turns(server.calls[0]) == [("user", "/etc is what?")]


def test_help_names_every_command_and_quit_leaves(say, server):
    code, out, err = say("/help", "/quit", "Hi")
    assert (code, out) == (0, "")
    for command in ("/adapter", "/system", "/save", "/reset", "/help", "/quit", "Ctrl-C", "Ctrl-D"):
        assert command in err
    assert not server.calls


def cut(server, prompt_tokens):
    def script(generation, call):
        for message in server.two_messages(generation, call):
            if message.HasField("finish"):
                message.finish.reason = 2  # length
                message.finish.usage.prompt_tokens = prompt_tokens
            yield message

    return script


@pytest.mark.parametrize(
    ("prompt_tokens", "told"),
    [
        (97, "the context is full; /save FILE keeps the conversation, /reset begins anew\n"),
        (50, "the answer was cut at its limit of tokens, which --max-tokens sets\n"),
    ],
)
def test_a_full_context_and_a_cut_answer_are_told_with_what_to_do(say, server, prompt_tokens, told):
    server.info.max_context = 100
    server.script = cut(server, prompt_tokens)
    assert say("Hi") == (0, "Hello world\n", told)


def test_a_conversation_that_is_too_long_is_told_with_what_to_do(say, server):
    def fail(call, context):
        if len(call.request.generation.chat.messages) > 2:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "prompt has more than 99 tokens")

    server.fail = fail
    code, _, err = say("Hi", "And?", "/reset", "Hi")
    assert code == 5
    assert err == (
        "redmux: prompt has more than 99 tokens\n"
        "the conversation is as before; if it has become too long, /reset begins anew\n"
        "the conversation is empty\n"
    )


def test_on_a_terminal_lines_can_be_edited_and_come_again(terminal, server):
    server.adapters["a"] = server.adapter("a")
    chat = terminal("chat", "--adapter", "a")
    assert "chat with a; /help tells the commands, Ctrl-D leaves" in chat.until("> ")
    chat.type("Hillo\x7f\x7f\x7f\x7fello\r")
    chat.until("Hello world\r\n> ")
    chat.type("\x1b[A\r")  # the line before
    chat.until("Hello world\r\n> ")
    chat.type("\x04")
    assert chat.ended()[0] == 0
    assert [turns(call)[-1] for call in server.seen("Generate")] == [("user", "Hello")] * 2


def test_ctrl_c_stops_the_answer_and_not_the_chat(terminal, server):
    server.script = server.first_then_silence
    chat = terminal("chat")
    chat.until("> ")
    chat.type("Hi\r")
    chat.until("Hello")
    chat.type("\x03")
    chat.until("(stopped)\r\n> ")
    assert server.calls[0].has_ended.wait(10)
    server.script = server.two_messages
    chat.type("On?\r")
    chat.until("Hello world\r\n> ")
    assert turns(server.calls[1]) == [("user", "Hi"), ("assistant", "Hello"), ("user", "On?")]
    chat.type("/quit\r")
    assert chat.ended()[0] == 0


def test_ctrl_c_at_the_prompt_drops_the_line_and_tells_how_to_leave(terminal, server):
    chat = terminal("chat")
    chat.until("> ")
    chat.type("nonsense")
    chat.until("nonsense")  # it is being read
    chat.interrupt_until("Ctrl-D leaves\r\n> ")
    chat.type("\x04")
    assert chat.ended()[0] == 0
    assert not server.calls
