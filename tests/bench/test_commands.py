"""The commands as people run them, on a tiny random model."""

import json
import os
from pathlib import Path

import pytest
from encoders import save_tiny_encoder

from redmux import InvalidArgumentError
from redmux_adapters import write_folder
from redmux_bench.cli import main

LOAD = ("--prompt-tokens", "4:8", "--output-tokens", "5", "--seed", "3")


def test_serve_reports_rates_and_latencies_and_takes_its_adapters_away(
    bench, serving, adapter_names, capsys
):
    code, got = bench(
        "serve", "--target", serving.address, *LOAD, "--num-requests", "12",
        "--concurrency", "4", "--adapters", "3", "--assignment", "zipf",
    )  # fmt: skip
    assert code == 0
    (row,) = got["rows"]
    assert (row["num_requests"], row["num_completed"], row["failures"]) == (12, 12, {})
    assert row["output_tokens"] == 12 * 5
    assert 12 * 4 <= row["prompt_tokens"] <= 12 * 8
    assert row["output_tokens_per_s"] == pytest.approx(60 / row["duration_s"])
    for latency in ("time_to_first_token_ms", "inter_token_ms", "end_to_end_ms"):
        assert 0 <= row[latency]["p50"] <= row[latency]["p90"] <= row[latency]["p99"]
    assert got["command"].startswith("redmux bench serve --target")
    assert "12 of 12 requests completed" in capsys.readouterr().out
    assert adapter_names() == []


def test_serve_measures_several_loads_and_draws_their_latencies(bench, serving, tmp_path, capsys):
    plot = tmp_path / "latency.png"
    for flag, loads in (("--concurrency", [1, 4]), ("--rate", [50.0, 200.0])):
        code, got = bench(
            "serve", "--target", serving.address, *LOAD, "--num-requests", "6",
            flag, ",".join(f"{load:g}" for load in loads), "--plot", str(plot),
        )  # fmt: skip
        assert code == 0
        assert [row[flag.removeprefix("--")] for row in got["rows"]] == loads
        assert [row["num_completed"] for row in got["rows"]] == [6, 6]
        assert plot.read_bytes().startswith(b"\x89PNG")
        plot.unlink()
    assert "4 at a time: 6 of 6 requests completed" in capsys.readouterr().out


def test_failed_requests_are_counted_by_class_and_abort_nothing(bench, serving, capsys):
    # The context of the model ends at 256.
    load = ("--prompt-tokens", "2:400", "--output-tokens", "2", "--num-requests", "20")
    code, got = bench("serve", "--target", serving.address, *load, "--rate", "200")
    (row,) = got["rows"]
    assert code == 0
    assert 0 < row["num_completed"] < 20
    assert row["failures"] == {"InvalidArgumentError": 20 - row["num_completed"]}
    assert "InvalidArgumentError" in capsys.readouterr().out


def test_a_load_of_which_nothing_completes_is_exit_code_1(bench, serving):
    code, got = bench(
        "serve", "--target", serving.address, "--output-tokens", "999", "--num-requests", "2"
    )
    assert code == 1
    assert got["rows"][0]["time_to_first_token_ms"] is None


def test_sweep_compares_every_number_of_adapters_with_none_in_the_same_round(
    bench, serving, adapter_names, tmp_path
):
    plot = tmp_path / "sweep.png"
    code, got = bench(
        "sweep", "--target", serving.address, *LOAD, "--adapters", "0,1,5",
        "--concurrency", "3", "--rounds", "3", "--plot", str(plot),
    )  # fmt: skip
    assert code == 0
    assert [row["adapters"] for row in got["rows"]] == [0, 1, 5]
    base = got["rows"][0]["rounds"]
    for row in got["rows"]:
        assert len(row["rounds"]) == 3
        assert row["failures"] == {}
        ratios = [rate / b for rate, b in zip(row["rounds"], base, strict=True)]
        assert row["ratios"] == pytest.approx(ratios)
        assert row["ratio"] == pytest.approx(sorted(ratios)[1])
        assert row["output_tokens_per_s"] == sorted(row["rounds"])[1]
    assert got["rows"][0]["ratio"] == 1
    assert {"machine", "command", "model"} < got.keys()
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert adapter_names() == []


def test_floor_compares_steps_with_the_machine(bench):
    code, got = bench(
        "floor", "--points", "1:40,3:20", "--prefill-tokens", "50", "--chunk", "32", "--rounds", "3"
    )
    assert code == 0
    assert [(row["batch"], row["context"]) for row in got["rows"]] == [(1, 40), (3, 20)]
    for row in got["rows"]:
        assert row["floor_ms"] == pytest.approx(row["linears_ms"] + row["kv_ms"])
        assert row["step_over_floor"] > 0
        assert row["adapters_over_step"] > 0
    # 2 x 3 layers x 2 heads x 32 values x 4 bytes
    kv_s = 40 * 1536 / got["read_bandwidth_bytes_per_s"]
    assert got["rows"][0]["kv_ms"] == pytest.approx(1e3 * kv_s)
    (prefill,) = got["prefill"]
    assert (prefill["tokens"], prefill["chunk"]) == (50, 32)


def test_products_compare_arrays_at_cache_lines_with_others_in_turn(bench):
    code, got = bench("products", "--rows", "1,20", "--precision", "fp32", "--rounds", "2")
    assert code == 0
    told = [(row["precision"], row["rows"], row["aligned"]) for row in got["rows"]]
    assert told == [("fp32", 1, True), ("fp32", 20, True)]
    code, got = bench("products", "--rows", "20", "--precision", "fp32", "--unaligned")
    assert code == 0
    first, other = got["rows"]
    assert (first["aligned"], other["aligned"]) == (True, False)
    assert first["ms"] >= first["best_ms"] > 0
    assert other["over_aligned"] > 0


def test_products_of_a_model_that_is_not_fused_are_told_to_be_unknown(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(InvalidArgumentError, match="name one of the architectures"):
        main(["products", "--model", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.timeout(600)  # four starts of a server
def test_load_measures_puts_memory_and_starts(bench):
    code, got = bench(
        "load", *LOAD, "--samples", "3", "--streams", "2", "--registered", "4", "--startup",
        "--concurrency", "2", "--rounds", "1",
    )  # fmt: skip
    assert code == 0
    assert [row["background_streams"] for row in got["rows"]] == [0, 2]
    for row in got["rows"]:
        assert row["put_ms"]["p50"] <= row["put_to_first_token_ms"]["p50"]
    assert [phase["name"] for phase in got["registered"]["phases"]] == [
        "before", "registered", "deleted",
    ]  # fmt: skip
    assert got["registered"]["vector_bytes"] == 8 * 3 * 64
    assert got["startup"]["adapters"] == 4
    for kind in ("empty", "full"):
        assert len(got["startup"][f"{kind}_rounds_s"]) == 1


@pytest.mark.slow
def test_engine_gets_the_same_tokens_all_ways(bench):
    code, got = bench("engine", *LOAD, "--concurrency", "3", "--rounds", "2")
    assert code == 0
    (row,) = got["rows"]
    assert row["streams"] == 3
    rounds = [row[f"{way}_rounds"] for way in ("engine", "wire", "http")]
    assert [len(rates) for rates in rounds] == [2, 2, 2]
    assert min(*rounds[0], *rounds[1], *rounds[2], row["client_cpu_ms_per_token"]) > 0
    assert row["http_first_token_ms"] > 0


def test_constrained_measures_every_grammar_and_none_before_and_behind_them(bench):
    code, got = bench("constrained", *LOAD, "--concurrency", "5", "--rounds", "2")
    assert code == 0
    kinds = [row["grammar"] for row in got["rows"]]
    assert kinds == ["none", "objects", "text", "regex", "lark", "all of these", "none again"]
    assert [row["constrained_rows"] for row in got["rows"]] == [0, 2, 2, 2, 2, 2, 0]
    assert got["rows"][0]["ratio"] == 1
    assert min(rate for row in got["rows"] for rate in row["rounds"]) > 0


def test_drafts_compares_answers_with_those_without_them(bench, base, tmp_path, monkeypatch):
    monkeypatch.setattr("redmux_bench.zoo_texts.BUNDLED", ())
    write_folder(base.adapter(1), tmp_path / "one")
    texts = [json.dumps({"user": f"text {i}"}) for i in range(30)]
    (tmp_path / "mine.test.jsonl").write_text("\n".join(texts))
    code, got = bench(
        "drafts", "--data", str(tmp_path), "--adapter", f"mine={tmp_path / 'one'}",
        "--concurrency", "1,3", "--learned", "2", "--max-tokens", "8", "--rounds", "2",
    )  # fmt: skip
    assert code == 0
    assert [(row["adapter"], row["concurrency"]) for row in got["rows"]] == [
        ("mine", 1), ("base", 1), ("mine", 3), ("base", 3), ("all adapters", 1), ("all adapters", 3)
    ]  # fmt: skip
    for row in got["rows"]:
        assert row["equal_bits"]
        assert len(row["rounds"]) == 2
        assert row["ratio"] > 0


def test_drafts_says_where_test_texts_are_missing(bench, tmp_path):
    with pytest.raises(InvalidArgumentError, match="no test texts of booking"):
        bench("drafts", "--data", str(tmp_path))


def test_train_compares_adapters_together_with_one_after_the_other(bench, capsys):
    code, got = bench(
        "train", "--tasks", "3", "--batch-sizes", "1,2", "--steps", "2", "--rounds", "2",
        "--prompt-tokens", "4:8", "--output-tokens", "2",
    )  # fmt: skip
    assert code == 0
    assert [row["batch_size"] for row in got["rows"]] == [1, 2]
    for row in got["rows"]:
        assert len(row["together_rounds"]) == len(row["apart_rounds"]) == 2
        assert row["together_tokens_per_s"] > 0
        assert row["ratio"] > 0
    assert "3 together tokens/s" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)  # a process that trains has to import and to load, twice
def test_jobs_compares_latencies_with_and_without_training(bench, serving, capsys):
    code, got = bench(
        "jobs", "--target", serving.address, *LOAD, "--concurrency", "2", "--num-requests", "8",
        "--tasks", "2", "--batch-size", "1", "--rounds", "2",
    )  # fmt: skip
    assert code == 0
    assert [row["is_training"] for row in got["rows"]] == [False, True]
    alone, beside = got["rows"]
    assert alone["training_tokens_per_s"] == 0
    ratios = [b / a for a, b in zip(alone["p99_rounds_ms"], beside["p99_rounds_ms"], strict=True)]
    assert got["p99_ratio"] == pytest.approx(sum(ratios) / 2)
    assert got["failures"] == {}
    assert "while training over that alone" in capsys.readouterr().out


def test_train_takes_an_encoder(tmp_path, capsys):
    model = save_tiny_encoder(tmp_path / "encoder", "bert")
    code = main([
        "train", "--model", str(model), "--tasks", "2", "--batch-sizes", "1", "--rounds", "1",
        "--prompt-tokens", "4:8",
    ])  # fmt: skip
    assert code == 0
    assert "2 together tokens/s" in capsys.readouterr().out


def test_startup_compares_a_first_start_with_later_ones_from_the_same_cache(bench, monkeypatch):
    caches = []

    class Server:
        def __init__(self, *flags, environ):
            self.cache = environ["REDMUX_CACHE"]
            self.startup_s = 5.0 - len(caches)
            self.cpu_s, self.resident_bytes = 2 * self.startup_s, 1000

        def __enter__(self):
            caches.append((self.cache, sorted(os.listdir(self.cache))))
            Path(self.cache, "kernels").mkdir(exist_ok=True)
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr("redmux_bench.ready.ServerProcess", Server)
    code, got = bench("startup", "--rounds", "3")
    assert code == 0
    folder = caches[0][0]
    assert caches == [(folder, []), *[(folder, ["kernels"])] * 3]
    figures = ("first_s", "later_s", "cpu_s", "rss_bytes", "first_cpu_s")
    assert [got[name] for name in figures] == [5.0, 3.0, 6.0, 1000, 10.0]
