"""Classify and Embed: what both clients and the commands send, take and print."""

import io
import json

import grpc
import pytest

import redmux
from redmux.cli import main
from redmux.v1 import inference_service_pb2 as inference_pb

DIGEST = "sha256:" + "ab" * 32
INPUTS = ["a text", [1, 2, 3], ("a question", "its answer")]


def forms(request):
    return [
        {
            "text": item.text,
            "token_ids": list(item.token_ids.ids),
            "pair": (item.pair.first, item.pair.second),
        }[item.WhichOneof("form")]
        for item in request.inputs
    ]


def test_classify_sends_every_form_and_returns_a_result_each(client, server):
    answer = client.classify(INPUTS, adapter="sst2")
    (call,) = server.seen("Classify")
    assert forms(call.request) == INPUTS
    assert call.request.adapter == "sst2"
    result = redmux.Classification(("no", "yes"), (0.25, 0.75), (-1.0, 0.5))
    assert result.label == "yes"
    assert answer == redmux.Classifications(
        results=(result,) * 3, labels=("no", "yes"), problem_type="single_label",
        usage=redmux.Usage(7, 0), adapter="sst2", digest=DIGEST,
    )  # fmt: skip


@pytest.mark.parametrize("adapter", ["one", None])
def test_embed_sends_every_form_and_returns_a_vector_each(client, server, adapter):
    answer = client.embed(INPUTS, adapter=adapter, pooling="cls", normalize=True)
    (call,) = server.seen("Embed")
    assert forms(call.request) == INPUTS
    assert (call.request.pooling, call.request.normalize) == (inference_pb.POOLING_CLS, True)
    assert answer.vectors == ((0.5, -1.5),) * 3
    assert answer.usage == redmux.Usage(7, 0)
    assert (answer.adapter, answer.digest) == (adapter, adapter and DIGEST)


def test_unset_pooling_is_the_servers_to_choose(client, server):
    client.embed(["x"])
    assert server.seen("Embed")[0].request == inference_pb.EmbedRequest(
        inputs=[inference_pb.Input(text="x")]
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.classify(["x"], adapter=""), "adapter is ''"),
        (lambda c: c.classify("x", adapter="a"), r"write \[text\] for one text"),
        (lambda c: c.embed("x"), r"write \[text\] for one text"),
        (lambda c: c.embed(["x"], adapter=""), "leave it out for the base model"),
        (lambda c: c.embed(["x"], pooling="max"), "use one of mean, cls, last"),
        (lambda c: c.embed(["x", 5]), r"inputs\[1\] is int"),
        (lambda c: c.embed([b"x"]), r"inputs\[0\] is bytes"),
        (lambda c: c.embed([["a", "b", "c"]]), r"inputs\[0\] is list"),
        (lambda c: c.embed([[True]]), r"inputs\[0\] is list"),
        (lambda c: c.embed([[1 << 40]]), r"inputs\[0\]"),
    ],
)
def test_arguments_of_a_wrong_kind_never_leave_the_client(client, server, call, message):
    with pytest.raises(redmux.InvalidArgumentError, match=message):
        call(client)
    assert not server.calls


def test_a_problem_type_of_a_newer_server_is_an_error(client, server):
    server.problem_type = 9
    with pytest.raises(redmux.RedmuxError, match="problem type is unknown"):
        client.classify(["x"], adapter="a")


@pytest.fixture
def run(target, capsys):
    """Runs a command against the server; returns its exit code, stdout and stderr."""

    def run(*arguments):
        code = main([*arguments, "--target", target])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_command_classify_prints_the_best_label_of_each_text(run, server):
    assert run("classify", "--adapter", "a", "x", "y") == (0, "yes 0.7500\nyes 0.7500\n", "")
    server.problem_type = inference_pb.PROBLEM_TYPE_MULTI_LABEL
    assert run("classify", "--adapter", "a", "x")[1] == "no 0.2500  yes 0.7500\n"


def test_the_commands_print_json(run):
    _, out, _ = run("classify", "--json", "--adapter", "a", "x")
    assert json.loads(out) == {
        "labels": ["no", "yes"], "scores": [0.25, 0.75], "logits": [-1.0, 0.5],
        "problem_type": "single_label", "adapter": "a", "digest": DIGEST,
    }  # fmt: skip
    _, out, _ = run("embed", "--json", "x")
    assert json.loads(out) == {"vector": [0.5, -1.5], "adapter": None, "digest": None}


def test_the_command_embed_runs_adapters_side_by_side(run, server):
    def fail(call, context):
        if call.request.adapter == "bad":
            context.abort(grpc.StatusCode.NOT_FOUND, "no adapter 'bad'")

    server.fail = fail
    code, out, err = run(
        "embed", "--adapter", "a", "--adapter", "bad", "--base", "--pooling", "last", "x"
    )
    assert code == 4
    assert out == "== (base model) ==\n0.5 -1.5\n== a ==\n0.5 -1.5\n"
    assert err == "redmux: bad: no adapter 'bad'\n"
    assert server.calls[0].request.pooling == inference_pb.POOLING_LAST


def test_texts_come_from_stdin_line_by_line_and_as_pairs(run, server, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\nthree\n"))
    assert run("embed", "--pairs", "zero", "-")[0] == 0
    assert forms(server.calls[0].request) == [("zero", "one"), ("two", "three")]
    code, _, err = run("embed", "--pairs", "alone")
    assert (code, err) == (5, "redmux: --pairs takes texts two by two; 1 are given\n")


def test_embeddings_are_a_matrix_to_numpy(client):
    numpy = pytest.importorskip("numpy")
    answer = client.embed(["x", "y"])
    matrix = numpy.asarray(answer)
    assert (matrix.dtype, matrix.shape) == (numpy.float32, (2, 2))
    assert matrix.tolist() == [[0.5, -1.5], [0.5, -1.5]]
    assert numpy.asarray(answer, dtype=numpy.float64).dtype == numpy.float64
    with pytest.raises(ValueError, match="a copy is made"):
        numpy.array(answer, copy=False)
