"""PackedDecoder against plain transformers: one example at a time, edits and gradients by hand."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from reference import edited
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from redmux_adapters.bases.sites import linear_sites, with_layer_norms
from redmux_adapters.format.window import EVERYWHERE
from redmux_adapters.train import Example, TrainingBase
from redmux_adapters.train.bank import VectorBank
from redmux_adapters.train.objectives import GenerationObjective, Row
from redmux_adapters.train.packed import can_pack

SIZES = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": 400,
    "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "grouped heads": LlamaConfig(**SIZES, num_key_value_heads=2),
    "biases": LlamaConfig(**SIZES, num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "head norms": Qwen3Config(**SIZES, num_key_value_heads=1),
    "biases of q, k and v": Qwen2Config(**SIZES, num_key_value_heads=2),
}
LENGTHS = (3, 150, 40, 300, 38, 36, 9)  # longer than queries attend at a time, and shorter


class NoTokenizer:
    eos_token_id = 2


def base_of(config):
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return TrainingBase.of(model, NoTokenizer())


def prepared(base, autocast=False):
    """An objective, its bank with values wherever adapters may have them, and two adapters' sites.

    The second adapter has LayerNorms, too.
    """
    sites = linear_sites(base.model) | {"model.layers.0": 32}
    normed = with_layer_norms(sites)
    bank = VectorBank(base.model, normed, 2)
    objective = GenerationObjective(base, bank, autocast)
    bank.values.copy_(0.2 * torch.randn(bank.values.shape, generator=torch.manual_seed(9)))
    bank.normalise(1, normed)
    return objective, bank, [sites, normed]


def rows_of(lengths, smoothing=0.1, where=lambda length: EVERYWHERE):
    drawn = torch.Generator().manual_seed(7)
    ids = [torch.randint(0, 90, (length,), generator=drawn).tolist() for length in lengths]
    return [
        Row(
            i % 2, Example(tuple(t[:-2]), tuple(t[-2:]), edited=where(len(t))), 0.1 * (i + 1),
            smoothing,
        )
        for i, t in enumerate(ids)
    ]  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_of_plain_transformers(name):
    check(base_of(CONFIGS[name]), rows_of(LENGTHS))


WINDOWS = {
    "the prompt": lambda length: range(length - 2),
    "from its last token on": lambda length: range(length - 3, EVERYWHERE.stop),
    "some for some": lambda length: EVERYWHERE if length == 150 else range(2, length // 2),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_tokens_that_are_not_edited_give_no_gradients(name):
    check(base_of(CONFIGS["grouped heads"]), rows_of(LENGTHS, where=WINDOWS[name]))


@pytest.mark.parametrize("name", WINDOWS)
def test_padded_examples_are_edited_where_packed_ones_are(name, monkeypatch):
    monkeypatch.setattr("redmux_adapters.train.objectives.can_pack", lambda model: False)
    base = base_of(CONFIGS["grouped heads"])
    check(base, rows_of(LENGTHS[:3], where=WINDOWS[name]), pads=True)


def check(base, rows, pads=False):
    """Compares a pass with the plain model, one example at a time."""
    objective, bank, sites = prepared(base)
    assert objective.pads == pads
    objective.run(rows, train=True)
    bank.close()
    expected = torch.zeros_like(bank.grads)
    for row in rows:
        values = bank.values[row.adapter].clone().requires_grad_()
        targets = torch.tensor(row.example.targets)
        edits = {
            site: SimpleNamespace(scale=1 + values[scale], bias=values[bias], dim=dim)
            for site, dim in sites[row.adapter].items()
            for scale, bias in (bank._places[site],)
        }
        where = None if row.example.edited == EVERYWHERE else row.example.edited
        with edited(base.model, edits, where):
            ids = torch.tensor([row.example.inputs + row.example.targets])
            logits = base.model(input_ids=ids).logits[0, -3:-1]
        told = F.cross_entropy(logits.detach(), targets, reduction="sum").item()
        assert row.loss == pytest.approx(told, rel=1e-4)
        loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)
        (gradient,) = torch.autograd.grad(row.weight * loss, values)
        expected[row.adapter] += gradient
    largest = float(expected.abs().max())
    torch.testing.assert_close(bank.grads, expected, rtol=1e-3, atol=1e-5 * largest)


def test_a_row_that_is_not_finite_spoils_no_other_adapter():
    base = base_of(CONFIGS["grouped heads"])
    objective, bank, _ = prepared(base)
    rows = rows_of((20, 20, 19))
    objective.run(rows, train=True)
    alone, losses = bank.grads[0].clone(), [row.loss for row in rows]
    bank.grads.zero_()
    bank.values[1] = torch.nan
    objective.run(rows, train=True)
    assert not bank.grads[1].isfinite().all()
    assert torch.equal(bank.grads[0], alone)
    assert [rows[0].loss, rows[2].loss] == [losses[0], losses[2]]


def test_products_in_bf16_have_nearly_the_losses_and_gradients():
    base = base_of(CONFIGS["grouped heads"])
    found = []
    for autocast in (False, True):
        objective, bank, _ = prepared(base, autocast)
        rows = rows_of((20, 18, 9))
        objective.run(rows, train=True)
        bank.close()
        found.append((torch.tensor([row.loss for row in rows]), bank.grads))
    (losses, grads), (other_losses, other_grads) = found
    torch.testing.assert_close(other_losses, losses, rtol=0.05, atol=0.05)
    assert not torch.equal(other_losses, losses)
    assert F.cosine_similarity(grads.flatten(), other_grads.flatten(), dim=0) > 0.99


def test_models_of_another_kind_are_run_by_transformers():
    windowed = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)
    assert not can_pack(base_of(windowed).model)
    assert not can_pack(base_of(LlamaConfig(**SIZES, hidden_act="gelu")).model)
    assert can_pack(base_of(MistralConfig(**SIZES, sliding_window=None)).model)
