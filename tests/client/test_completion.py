import shutil
import subprocess
import sys

import pytest

from redmux.cli import main

BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
COMP_LINE="${COMP_WORDS[*]}"; COMP_POINT=${#COMP_LINE}
function=$(complete -p redmux | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
"$function" redmux "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = """
source $argv[1]
complete -C (string join ' ' -- $argv[2..]) | cut -f 1
"""
SHELLS = {"bash": ["bash", "--norc", "-c", BASH, "bash"], "fish": ["fish", "--private", "-c", FISH]}


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Writes the script for a shell, as the command prints it, and returns its path."""
    pytest.importorskip("shtab")
    folder = tmp_path_factory.mktemp("completion")

    def write(shell):
        command = [sys.executable, "-m", "redmux", "completion", shell]
        done = subprocess.run(command, capture_output=True, check=True, timeout=120)
        path = folder / shell
        path.write_bytes(done.stdout)
        return path

    return write


def with_shell(name):
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name}")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_commands_options_and_choices(script, shell):
    with_shell(shell)
    path = str(script(shell))

    def completed(*words):
        done = subprocess.run(
            [*SHELLS[shell], path, "redmux", *words], capture_output=True, text=True, timeout=60
        )
        assert done.stderr == ""
        return set(done.stdout.split())

    assert completed("do") == {"doctor"}
    assert completed("adapters", "l") == {"list"}
    assert completed("chat", "--sy") == {"--system"}
    assert completed("embed", "--pooling", "m") == {"mean"}
    assert completed("completion", "z") == {"zsh"}
    # Of the extras, which are installed here.
    assert completed("serve", "--quant") == {"--quantization"}
    assert completed("adapters", "st") == {"stamp"}
    assert completed("train", "--clip") == {"--clip-norm"}
    assert completed("bench", "sw") == {"sweep"}


def test_zsh_reads_its_script(script):
    with_shell("zsh")
    subprocess.run(["zsh", "-n", str(script("zsh"))], check=True, timeout=60)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_no_script_holds_what_the_environment_says(capsys, monkeypatch, shell):
    pytest.importorskip("shtab")
    monkeypatch.setenv("REDMUX_API_KEY", "s3cret-key")
    monkeypatch.setenv("REDMUX_TARGET", "private.example:1")
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert "redmux" in out
    assert "s3cret-key" not in out
    assert "private.example" not in out


def test_extras_that_are_not_installed_are_names_without_options(capsys, monkeypatch):
    pytest.importorskip("shtab")
    for module in (
        "redmux_server.config", "redmux_bench.cli", "redmux_adapters.train.command_line",
        "redmux_adapters.cli",
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["completion", "bash"]) == 0
    out = capsys.readouterr().out
    assert "--quantization" not in out
    assert "--temperature" in out


def test_without_its_package_it_tells_what_to_install(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "redmux._completion_command", raising=False)
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'redmux[completion]'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["csh"]], ids=str)
def test_other_shells_are_wrong_usage(capsys, arguments):
    pytest.importorskip("shtab")
    assert main(["completion", *arguments]) == 2
    assert "usage: redmux completion" in capsys.readouterr().err
