"""`redmux chat`: a conversation on a terminal, or a line and its answer in a pipe."""

import argparse
import importlib
import sys
from contextlib import closing, suppress
from pathlib import Path

from redmux._connecting import connect
from redmux._conversation import Conversation
from redmux._exit_codes import USAGE, exit_code
from redmux._shell import shell_line
from redmux.client import Client
from redmux.errors import InvalidArgumentError, RedmuxError
from redmux.types import Chunk, GenerationOptions

_HELP = """\
/adapter NAME  answer with this adapter from now on; without NAME with the base model
/system TEXT   set the system prompt; without TEXT there is none
/save FILE     write the conversation to a file, as JSON
/reset         forget the conversation; adapter and system prompt stay
/help          tell this
/quit          leave, as Ctrl-D does
//TEXT         say TEXT with one slash before it
Ctrl-C stops an answer; what was said of it stays in the conversation."""
_FULL = "the context is full; /save FILE keeps the conversation, /reset begins anew"


def add_chat(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    server: argparse.ArgumentParser,
) -> None:
    """Adds the command; `server` has the options of the connection."""
    parser = commands.add_parser(
        "chat", parents=[server], help="talk with the server, with or without an adapter",
        description="Talk with the server. Each line is a message that all turns before it go "
        "with; /help tells the commands. In a pipe, each line of stdin is answered on stdout.",
    )  # fmt: skip
    parser.set_defaults(run=_chat)
    parser.add_argument("--adapter", metavar="NAME", help="default: the base model")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="limit of every answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="default: 0, greedy")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--seed", type=int, metavar="N", help="make the draws repeatable")


def _chat(options: argparse.Namespace) -> int:
    wanted = GenerationOptions(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    with connect(options) as client:
        _check_name(client, options.adapter)  # before anything is said
        chat = _Chat(client, wanted, options)
        return chat.talk() if sys.stdin.isatty() and sys.stdout.isatty() else chat.answer_lines()


class _Chat:
    """A conversation with a server; what fails is told, and the chat goes on."""

    def __init__(
        self, client: Client, wanted: GenerationOptions, options: argparse.Namespace
    ) -> None:
        self._client = client
        self._wanted = wanted
        self._timeout_s: float | None = options.timeout
        self._adapter: str | None = options.adapter
        self._conversation = Conversation(options.system)
        self._code = 0  # of the first failure
        self._is_over = False

    def talk(self) -> int:
        """Talks with somebody at a terminal until they leave; returns 0."""
        with suppress(ModuleNotFoundError):  # where Python has it, input() edits and remembers
            importlib.import_module("readline")
        with_whom = self._adapter or "the base model"
        print(f"chat with {with_whom}; /help tells the commands, Ctrl-D leaves", file=sys.stderr)
        while not self._is_over:
            try:
                line = input("> ")
            except EOFError:
                print()
                break
            except KeyboardInterrupt:
                print("\nCtrl-D leaves", file=sys.stderr)
                continue
            self._take(line, can_stop=True)
        return 0

    def answer_lines(self) -> int:
        """Answers every line of stdin; returns the exit code of the first failure."""
        while not self._is_over and (line := sys.stdin.readline()):
            self._take(line, can_stop=False)
        return self._code

    def _take(self, line: str, *, can_stop: bool) -> None:
        text = line.strip()
        try:
            if text.startswith("/") and not text.startswith("//"):
                self._command(*text[1:].split(maxsplit=1))
            elif text:
                self._ask(text.removeprefix("/") if text.startswith("//") else text)
        except KeyboardInterrupt:
            if not can_stop:
                raise
            _tell("(stopped)")
        except (RedmuxError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            self._code = self._code or exit_code(error)
            _tell(f"redmux: {shell_line(str(error))}")
            if isinstance(error, InvalidArgumentError) and self._conversation.turns:
                _tell(
                    "the conversation is as before; if it has become too long, /reset begins anew"
                )

    def _ask(self, question: str) -> None:
        """Prints the answer as it comes, and keeps both; one that is stopped, as far as it came."""
        messages = self._conversation.messages(question)
        self._wanted["adapter"] = self._adapter
        stream = self._client.stream(messages, timeout_s=self._timeout_s, **self._wanted)
        texts: list[str] = []
        last: Chunk | None = None
        try:
            with closing(stream) as chunks:
                for last in chunks:
                    texts.append(last.text)
                    print(last.text, end="", flush=True)
        finally:
            if last is not None:
                print(flush=True)
            if any(texts):
                assert last is not None
                self._conversation.add(question, "".join(texts), last)
        if last is not None and last.finish_reason == "length" and last.usage is not None:
            self._tell_why_cut(last.usage.prompt_tokens + last.usage.completion_tokens)

    def _tell_why_cut(self, num_tokens: int) -> None:
        if num_tokens >= self._client.info().max_context:
            _tell(_FULL)
        else:
            _tell("the answer was cut at its limit of tokens, which --max-tokens sets")

    def _command(self, name: str = "", argument: str = "") -> None:
        if name == "adapter":
            self._set_adapter(argument)
        elif name == "system":
            self._conversation.system = argument
            _tell("system prompt set" if argument else "no system prompt")
        elif name == "save" and argument:
            self._conversation.save(Path(argument).expanduser(), self._adapter)
            _tell(f"saved to {argument}")
        elif name == "reset":
            self._conversation.reset()
            _tell("the conversation is empty")
        elif name == "help":
            _tell(_HELP)
        elif name == "quit":
            self._is_over = True
        elif name == "save":
            self._misused("/save needs the name of a file")
        else:
            self._misused(f"there is no /{name}; /help tells the commands")

    def _misused(self, text: str) -> None:
        self._code = self._code or USAGE
        _tell(f"redmux: {text}")

    def _set_adapter(self, name: str) -> None:
        _check_name(self._client, name)
        self._adapter = name or None
        _tell(f"answers come from {name or 'the base model'}")


def _check_name(client: Client, name: str | None) -> None:
    """Raises NotFoundError for an adapter that is not there."""
    if name and not name.startswith("sha256:"):  # digests are no names, and seldom mistyped
        client.adapters.get(name)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
