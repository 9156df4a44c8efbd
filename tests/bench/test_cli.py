import argparse
import json
import re
import subprocess
import sys

import pytest

from redmux.cli import main
from redmux_bench import report, tables

COMMANDS = ("serve", "sweep", "load", "floor", "products", "startup", "engine", "jobs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["serve", "--concurrency", "0"], "0 is too small"),
        (["serve", "--num-requests", "-1"], "no whole number"),
        (["serve", "--rate", "0"], "no positive number"),
        (["serve", "--prompt-tokens", "9:3"], "the range 9:3 is empty"),
        (["serve", "--json", "nowhere/x.json"], "no folder for 'nowhere/x.json'"),
        (["serve", "--assignment", "best"], "invalid choice"),
        (["sweep", "--adapters", "1,8"], "and 0, which the others are compared with"),
        (["sweep", "--adapters", "0,8,8"], "each number once"),
        (["floor", "--points", "32"], "no whole number"),
        (["products", "--precision", "fp32,int2"], "'int2' is none of fp32, "),
        (["floor", "--target", "localhost:1"], "unrecognized"),
    ],
    ids=str,
)
def test_wrong_usage_is_told_before_anything_runs(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_tells_its_defaults(command, capsys):
    assert main(["bench", command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: redmux bench {command}" in out
    assert "default: " in out


def test_help_needs_no_torch():
    code = (
        "import sys; from redmux.cli import main; main(['bench', 'serve', '--help']); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_startup_needs_a_number_of_adapters(capsys):
    assert main(["bench", "load", "--startup"]) == 5
    assert "--startup needs --registered" in capsys.readouterr().err


def test_a_server_that_does_not_start_is_one_line(capsys, tmp_path):
    assert main(["bench", "serve", "--model", str(tmp_path / "no.gguf")]) == 3
    err = capsys.readouterr().err
    assert re.fullmatch(r"redmux: the server did not start: no such model file: .*no.gguf\n", err)


def test_a_table_lines_its_columns_up(capsys):
    tables.print_table(("name", "x"), [("a", 1234.5), ("bcdefg", 0.98765), ("h", None)])
    assert capsys.readouterr().out.splitlines() == [
        "name        x", "a        1234", "bcdefg  0.988", "h           -",
    ]  # fmt: skip


def test_json_tells_how_the_figures_were_got(tmp_path):
    file = tmp_path / "results.json"
    options = argparse.Namespace(json=str(file), command_line="redmux bench serve")
    report.write_json(options, "tiny", {"rows": [1]})
    content = json.loads(file.read_text())
    assert content["rows"] == [1]
    assert (content["model"], content["command"]) == ("tiny", "redmux bench serve")
    assert content["machine"]["cores"] >= 1
    assert content["machine"]["packages"]["torch"]
