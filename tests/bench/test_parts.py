"""The parts that speak to the engine's own classes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from redmux_adapters import ffn_sites
from redmux_bench.adapters import model_sites, random_adapter
from redmux_bench.limits import LinearFloor
from redmux_bench.steps import TimedSteps
from redmux_server.config import ServerConfig
from redmux_server.device import choose
from redmux_server.models.load_causal import load_causal


def test_sites_are_known_without_the_weights(base, tiny_folder):
    assert model_sites(str(tiny_folder)) == ffn_sites(base.model) == base.ffn


def test_random_adapters_have_the_magnitude_that_is_written_down():
    adapter = random_adapter("base", {"site": 20_000}, seed=1)
    edit = adapter.edits["site"]
    assert edit.scale.mean() == pytest.approx(1, abs=0.01)
    assert edit.scale.std() == pytest.approx(0.1, rel=0.05)
    assert edit.bias.std() == pytest.approx(0.05, rel=0.05)
    assert adapter == random_adapter("base", {"site": 20_000}, seed=1)
    assert adapter != random_adapter("base", {"site": 20_000}, seed=2)


def test_the_floor_runs_every_linear_once_and_the_head_for_its_own_rows(monkeypatch):
    linears = [nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 5)]
    seen = []
    for module in linears:
        monkeypatch.setattr(module, "forward", lambda x, m=module: seen.append((m, x.shape[1])))
    floor = LinearFloor(SimpleNamespace(linears=linears, vocab_size=5))
    floor.seconds(rows=7, head_rows=2)
    assert seen == [(linears[0], 7), (linears[1], 7), (linears[2], 2)]
    seen.clear()
    floor.seconds(rows=7, head_rows=0)
    assert [rows for _, rows in seen] == [7, 7]


def test_a_decode_step_attends_to_the_context_that_was_filled_and_commits_nothing(
    base, tiny_folder, monkeypatch
):
    config = ServerConfig(model=str(tiny_folder), kv_cache_tokens=512)
    model = load_causal(config, choose(config))
    got = []
    forward = model.runner.forward
    monkeypatch.setattr(
        model.runner, "forward", lambda work: got.append((work, forward(work))) or got[-1][1]
    )
    steps = TimedSteps(model, chunk=16, seed=0)
    for context in (40, 24):
        steps.fill(context)
    got.clear()
    adapter = base.adapter(1)
    for _ in range(2):
        assert steps.decode_s(2, 24, []) > 0
    steps.decode_s(2, 24, [adapter, adapter])
    (first_work, first), (_, second), (_, edited) = got
    assert torch.equal(first, second)
    assert not torch.allclose(first, edited, atol=0.1)
    for item, row in zip(first_work, first, strict=True):
        ids = torch.tensor([item.request.token_ids])
        assert ids.shape[1] == 25
        torch.testing.assert_close(row, base.model(ids).logits[0, -1], rtol=1e-3, atol=1e-3)
    assert model.bank.num_uses == 0
