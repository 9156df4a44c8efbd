import json
from dataclasses import asdict, fields

import grpc
import pytest

import redmux
from redmux._load_figures import Figures
from redmux._load_figures import figures as figures_between
from redmux._top_command import frame
from redmux.v1 import admin_service_pb2 as pb


def latencies(*counts, sum_s=1.0):
    return pb.Latencies(limits_s=[0.1, 0.5], counts=counts, sum_s=sum_s)


def info(uptime_s, **load):
    """A server's state; `load` is what it has done so far."""
    histograms = ("first_token", "between_tokens", "whole_request")
    load = {name: latencies(0, 0, 0, sum_s=0) for name in histograms} | load
    return pb.ServerInfo(
        version="1.2.3", model="tiny", device="cpu", dtype="float32", kind="decoder",
        max_running=8, max_queue=16, num_running=2, num_waiting=4, num_adapters=9,
        kv_cache_tokens=4096, uptime_s=uptime_s,
        load=pb.Load(num_running_adapters=2, kv_cache_used=0.25, **load),
    )  # fmt: skip


def work(server, *states):
    """Makes the server be in these states, one after the other; the last one stays."""
    left = list(states)

    def fail(call, context):
        if call.method == "GetServerInfo" and left:
            state = left.pop(0)
            if state is None:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the server is draining")
            server.info = state

    server.fail = fail


BEFORE = info(10, num_completion_tokens=100, first_token=latencies(5, 0, 0))
AFTER = info(
    14, num_completion_tokens=180, num_prompt_tokens=40, num_cached_tokens=20, num_ended=8,
    num_refused=2, first_token=latencies(7, 2, 0, sum_s=2),
)  # fmt: skip


def test_once_tells_rates_and_latencies_of_one_interval(run, server):
    work(server, BEFORE, AFTER)
    code, out, err = run("top", "--once", "--interval", "0.1", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert list(found) == [field.name for field in fields(Figures)]
    assert (found["num_running"], found["num_waiting"], found["num_running_adapters"]) == (2, 4, 2)
    assert (found["kv_cache_used"], found["interval_s"]) == (0.25, 4)
    assert found["completion_tokens_per_s"] == 20
    assert found["prompt_tokens_per_s"] == 10
    assert found["cached_tokens_per_s"] == 5
    assert (found["requests_per_s"], found["refused_per_s"]) == (2, 0.5)
    assert found["first_token"] == {"num": 4, "p50_s": 0.1, "p95_s": pytest.approx(0.46)}
    assert found["whole_request"] == {"num": 0, "p50_s": None, "p95_s": None}


def test_once_prints_the_same_for_people(run, server):
    work(server, BEFORE, AFTER)
    code, out, _ = run("top", "--once", "--interval", "0.1")
    assert code == 0
    assert out.splitlines()[0] == "redmux 1.2.3  tiny  cpu (float32)  up 14 s"
    assert "2 running, 9 published\n" in out
    assert "20.0 generated, 10.0 of prompts, 5.0 cached\n" in out
    assert "100 ms median, 460 ms for 95 of 100\n" in out


def test_a_restart_of_the_server_begins_anew(client, server):
    server.info = AFTER
    before = client.info()
    server.info = info(2, num_completion_tokens=30, first_token=latencies(1, 0, 0))
    found = figures_between(before, client.info())
    assert (found.completion_tokens_per_s, found.interval_s, found.first_token.num) == (15, 2, 1)


def test_a_server_that_tells_no_load_is_told_to_be_older(run, server):
    server.info.version = "0.0.1"
    code, out, err = run("top", "--once", "--interval", "0.1")
    assert (code, out) == (5, "")
    assert err == "redmux: the server is an older one, which does not tell its load\n"


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "1e9"])
def test_an_interval_out_of_bounds_is_refused(run, interval):
    code, _, err = run("top", "--once", "--interval", interval)
    assert code == 5
    assert "must be 0.1 to 3600" in err


@pytest.mark.parametrize("columns", [20, 50, 80, 200])
def test_no_line_is_wider_than_the_terminal(client, server, columns):
    server.info = BEFORE
    before = client.info()
    server.info = AFTER
    lines = frame(figures_between(before, client.info()), columns)
    assert max(map(len, lines)) <= columns
    bars = [line for line in lines if line.endswith("]")]
    assert len(bars) == (0 if columns == 20 else 3)


def test_a_live_view_redraws_and_leaves_the_terminal_as_it_was(terminal, server):
    later = pb.ServerInfo()
    later.CopyFrom(AFTER)
    later.uptime_s += 2
    work(server, BEFORE, AFTER, later)
    top = terminal("top", "--interval", "0.1", columns=60)
    assert top.until("\x1b[H\x1b[J").endswith("\x1b[?1049h\x1b[?25l")
    first = top.until("\x1b[H\x1b[J")
    assert "20.0 generated" in first
    assert max(len(line) for line in first.splitlines()) <= 60
    assert " 0.0 generated" in top.until("\x1b[H\x1b[J")
    top.type("\x03")
    code, rest = top.ended()
    assert code == 0
    assert rest.endswith("\x1b[?25h\x1b[?1049l")


def test_a_live_view_waits_for_a_server_that_is_gone(terminal, server):
    work(server, BEFORE, *[None] * 4, AFTER)  # one look is tried four times
    top = terminal("top", "--interval", "0.1")
    top.until("the server is draining")
    top.until("20.0 generated")
    top.type("\x03")
    assert top.ended()[0] == 0


def test_once_tells_by_its_code_that_there_is_no_server(run, server, target):
    server.stop()
    code, out, err = run("top", "--once", "--timeout", "5")
    assert (code, out) == (3, "")
    assert f"no server at {target}" in err


def test_quantiles_are_spread_between_limits_and_end_at_the_last():
    found = redmux.Latencies((1.0, 2.0), (2, 2, 0), 5.0)
    assert [found.quantile_s(share) for share in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 1.5, 2]
    assert redmux.Latencies((1.0, 2.0), (0, 0, 3), 30.0).quantile_s(0.5) == 2
    assert redmux.Latencies((1.0, 2.0), (0, 0, 0), 0.0).quantile_s(0.5) is None
    assert (found.num, found.mean_s) == (4, 1.25)
    assert redmux.Latencies((), (), 0.0).mean_s is None


def test_the_figures_are_plain_values(client, server):
    server.info = BEFORE
    before = client.info()
    assert json.dumps(asdict(figures_between(before, before)))
