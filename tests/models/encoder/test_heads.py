"""Heads: each request gets its own head's logits, with the same bits in any company."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from redmux_adapters import Head, HeadConfig
from redmux_adapters.format.head import KINDS
from redmux_server.models.cpu.packed_linear import packed_linear
from redmux_server.models.encoder.heads import Heads

HIDDEN = 48


class Pooler(nn.Module):
    """What a served encoder's pooler is: the first token, a packed product, tanh."""

    def __init__(self):
        super().__init__()
        self.dense = packed_linear(torch.randn(HIDDEN, HIDDEN), torch.randn(HIDDEN))
        self.activation = nn.Tanh()

    def forward(self, states):
        return self.activation(self.dense(states[:, 0]))


@pytest.fixture(scope="module")
def pooler():
    torch.manual_seed(0)
    return Pooler()


def make_head(kind, num_labels, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = {"h": HIDDEN, "l": num_labels}
    tensors = {
        name: torch.randn(*(sizes[letter] for letter in letters), generator=generator)
        for name, letters in KINDS[kind].items()
    }
    labels = [str(i) for i in range(num_labels)]
    return Head(HeadConfig(kind, labels, "multi_label_classification"), tensors)


def by_hand(head, states, pooler):
    t = head.tensors
    if head.config.kind == "mean":
        return t["classifier.weight"] @ states.mean(0) + t["classifier.bias"]
    if head.config.kind == "bert":
        return t["classifier.weight"] @ pooler(states[None])[0] + t["classifier.bias"]
    if head.config.kind == "distilbert":
        x = torch.relu(t["pre_classifier.weight"] @ states[0] + t["pre_classifier.bias"])
        return t["classifier.weight"] @ x + t["classifier.bias"]
    activation = F.gelu if head.config.kind == "electra" else torch.tanh
    x = activation(t["dense.weight"] @ states[0] + t["dense.bias"])
    return t["out_proj.weight"] @ x + t["out_proj.bias"]


def test_any_mix_of_heads_gives_each_request_its_own_logits_and_bits(pooler):
    heads = Heads(pooler)
    kinds = [make_head(k, n, 7 * n + i) for i, k in enumerate(KINDS) for n in (1, 2, 2, 5, 17)]
    generator = torch.Generator().manual_seed(1)
    rng = random.Random(2)
    owners = [rng.choice(kinds) for _ in range(40)] + [kinds[2]] * 21  # more than one slab of one
    states = [torch.randn(rng.randrange(1, 9), HIDDEN, generator=generator) for _ in owners]
    alone = [heads.logits([head], [rows])[0] for head, rows in zip(owners, states, strict=True)]
    for head, rows, got in zip(owners, states, alone, strict=True):
        torch.testing.assert_close(got, by_hand(head, rows, pooler), atol=1e-4, rtol=1e-4)
    for _ in range(5):
        order = rng.sample(range(len(owners)), rng.randrange(2, len(owners)))
        mixed = heads.logits([owners[i] for i in order], [states[i] for i in order])
        assert all(torch.equal(got, alone[i]) for got, i in zip(mixed, order, strict=True))
