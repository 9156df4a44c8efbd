"""What `score` sends and returns, of both clients and of the command."""

import json

import pytest

import redmux
from redmux.cli import main


def test_score_returns_a_value_per_continuation(client, server):
    scores = client.score("Say", [" hello", (7, 8)], adapter="acme/a")
    one = redmux.TokenScores((7, 8), (-0.5, -0.25), (True, False))
    assert scores == redmux.Scores((one, one), None, redmux.Usage(4, 2), "acme/a", None)
    assert one.logprob == -0.75
    assert not one.all_greedy
    sent = server.calls[0].request
    assert (sent.text, sent.adapter, sent.prompt_logprobs) == ("Say", "acme/a", False)
    assert sent.continuations[0].text == " hello"
    assert list(sent.continuations[1].token_ids.ids) == [7, 8]


def test_score_returns_the_prompt_if_asked_for(client):
    assert client.score([1, 2], prompt_logprobs=True).prompt.token_ids == (7, 8)


@pytest.mark.parametrize(
    ("continuations", "message"),
    [
        (" hello", "continuations is a sequence"),
        (5, "continuations is int; give a list"),
        ([3.5], r"continuations\[0\] is 3.5, must be a list of whole numbers"),
        ([[2**40]], r"continuations\[0\]\[0\] is 1099511627776, must be a whole number"),
    ],
)
def test_continuations_of_a_wrong_kind_are_refused_at_once(client, server, continuations, message):
    with pytest.raises(redmux.InvalidArgumentError, match=message):
        client.score("Say", continuations)
    assert not server.calls


def test_the_command_prints_a_line_per_text(target, capsys):
    assert main(["score", "Say", " hello", "--prompt-logprobs", "--target", target]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["-0.7500\t2 tokens\t-\t(prompt)", '-0.7500\t2 tokens\t-\t" hello"']


def test_the_command_prints_json(target, capsys):
    assert main(["score", "Say", " hello", "--json", "--target", target]) == 0
    assert json.loads(capsys.readouterr().out)["continuations"][0]["logprobs"] == [-0.5, -0.25]
