"""Editing: each row of a step gets its own adapter's edit, by the one form of the arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from redmux_server.engine.bank import SiteColumns
from redmux_server.models.cuda.row_edit import torch_edit
from redmux_server.models.editing import Editing, StepRows, TableRows

LAYOUT = {"up": SiteColumns(3, 12), "down": SiteColumns(30, 7)}
WIDTH = 50


class Twin(nn.Module):
    """Two sites; remembers what each gave out."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 7)
        for parameter in self.parameters():
            parameter.requires_grad_(False).normal_(generator=generator)

    def forward(self, x):
        up = self.up(x)
        return up.clone(), self.down(up)


def vectors(rows, site):
    """(scale, bias) of a row of the bank, cut out by hand."""
    start, dim = (3, 12) if site == "up" else (30, 7)
    return rows[start : start + dim], rows[start + dim : start + 2 * dim]


def expected(model, x, rows, owner):
    """Both outputs [tokens, dim], each token edited alone with the row of its owner."""
    up = edit(model.up(x), rows, owner, "up")
    return up, edit(model.down(up), rows, owner, "down")


def edit(h, rows, owner, site):
    out = []
    for token, row in enumerate(owner):
        if row is None:
            out.append(h[token])
            continue
        scale, bias = vectors(rows[row], site)
        out.append(scale * h[token] + bias)
    return torch.stack(out)


def step_of(counts, edited, seed):
    """(rows, StepRows, owner of each token) of decodes first and then prefills."""
    rows = torch.randn(len(counts), WIDTH, generator=torch.Generator().manual_seed(seed))
    num_decodes = next((i for i, n in enumerate(counts) if n > 1), len(counts))
    owner, prefills = list(range(num_decodes)), []
    for i in range(num_decodes, len(counts)):
        if edited[i]:
            prefills.append((len(owner), len(owner) + counts[i], i))
        owner += [i if edited[i] else None] * counts[i]
    return rows, StepRows(rows, num_decodes, prefills), owner


@pytest.mark.parametrize("dimensions", [2, 3])
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=4),
    st.integers(0, 1000),
)
def test_each_token_is_edited_by_its_own_request(dimensions, num_decodes, prefills, seed):
    counts = [1] * num_decodes + [n for n, _ in prefills]
    if not counts:
        return
    rows, step, owner = step_of(counts, [True] * num_decodes + [e for _, e in prefills], seed)
    model = Twin()
    x = torch.randn(len(owner), 5, generator=torch.Generator().manual_seed(seed))
    want = expected(model, x, rows, owner)
    editing = Editing(model)
    editing.install(LAYOUT)
    with editing.step(step):
        got = model(x if dimensions == 2 else x[None])
    for have, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(have.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [4, 7, 30, 64, 100])
def test_an_edit_has_the_bits_of_one_addcmul_alone_and_mixed(dim):
    """Identity modules, so that nothing but the edit itself could differ."""
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randn(9, 3 + 2 * dim, generator=generator)
    h = torch.randn(20, dim, generator=generator)
    owner = [0, 1, 2, 3, 4, 5, 6, *[7] * 8, *[8] * 5]
    alone = torch.stack(
        [torch.addcmul(rows[r, 3 + dim :], h[t], rows[r, 3 : 3 + dim]) for t, r in enumerate(owner)]
    )
    model = nn.ModuleDict({"site": nn.Identity()})
    editing = Editing(model)
    editing.install({"site": SiteColumns(3, dim)})
    with editing.step(StepRows(rows, 7, [(7, 15, 7), (15, 20, 8)])):
        got = model["site"](h.clone()[None])[0]
    assert torch.equal(got, alone)


@pytest.mark.parametrize("by_table", [False, True])
def test_a_layer_norm_follows_the_edit_of_the_requests_that_have_it(by_table):
    dim, tokens = 20, 12
    layout = {
        "site": SiteColumns(1, dim),
        "site.activation_ln": SiteColumns(45, dim, is_norm=True),
    }
    generator = torch.Generator().manual_seed(0)
    rows, h = torch.randn(5, 90, generator=generator), torch.randn(tokens, dim, generator=generator)
    rows[0, 1:21], rows[0, 21:41] = 1, 0  # the identity of a bank
    rows[:, 85] = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    owner = [1, 2, 3, *[4] * 4, *[3] * 5]
    want = h * rows[owner, 1:21] + rows[owner, 21:41]
    for t, row in enumerate(owner):
        if rows[row, 85]:
            want[t] = F.layer_norm(want[t], (dim,), rows[row, 45:65], rows[row, 65:85])
    step = StepRows(rows[[1, 2, 3, 4, 3]], 3, [(3, 7, 3), (7, 12, 4)])
    if by_table:
        step = TableRows(rows, torch.tensor(owner, dtype=torch.int32), torch_edit)
    model = nn.ModuleDict({"site": nn.Identity()})
    editing = Editing(model)
    editing.install(layout)
    with editing.step(step):
        got = model["site"](h.clone()[None])[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for first, last, place in ((0, 1, 0), (1, 2, 1), (3, 7, 3), (7, 12, 4)):  # alone
        with editing.step(StepRows(step_rows(rows, place), 0, [(0, last - first, 0)])):
            alone = model["site"](h[first:last].clone()[None])[0]
        assert torch.equal(alone, got[first:last])


def step_rows(rows, place):
    """The row of the request that is the `place`-th of the test above."""
    return rows[[1, 2, 3, 4, 3]][place : place + 1]


def test_without_a_step_outputs_are_untouched():
    model = Twin()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    plain = model(x)
    editing = Editing(model)
    editing.install(LAYOUT)
    with editing.step(None):
        inside = model(x)
    for a, b, c in zip(plain, inside, model(x), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_step_ends_when_its_block_fails():
    model, (rows, step, _) = Twin(), step_of([1], [True], 0)
    x = torch.ones(1, 5)
    plain = model(x)
    editing = Editing(model)
    editing.install(LAYOUT)
    with pytest.raises(KeyError), editing.step(step):
        raise KeyError
    assert torch.equal(model(x)[0], plain[0])
    assert rows.shape == (1, WIDTH)


def test_a_prefill_that_is_not_named_is_untouched():
    model = Twin()
    _, step, _ = step_of([1, 3, 3], [True, False, True], 0)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    plain = model.up(x)
    editing = Editing(model)
    editing.install({"up": LAYOUT["up"]})
    with editing.step(step):
        got, _ = model(x)
    assert torch.equal(got[1:4], plain[1:4])
    assert not torch.equal(got[4:], plain[4:])


def test_remove_takes_every_hook_away():
    model = Twin()
    editing = Editing(model)
    editing.install(LAYOUT)
    editing.remove()
    assert [len(m._forward_hooks) for m in model.modules()] == [0, 0, 0]


def test_installing_twice_hooks_a_site_once():
    model, (rows, step, owner) = Twin(), step_of([1, 1], [True, True], 3)
    x = torch.ones(2, 5)
    want = expected(model, x, rows, owner)
    editing = Editing(model)
    for _ in range(3):
        editing.install(LAYOUT)
    assert [len(m._forward_hooks) for m in (model.up, model.down)] == [1, 1]
    with editing.step(step):
        got = model(x)
    torch.testing.assert_close(got, want)


def test_installing_again_takes_over_moved_columns():
    model = Twin()
    editing = Editing(model)
    editing.install({"up": SiteColumns(0, 12)})
    editing.install({"up": SiteColumns(24, 12), "down": SiteColumns(0, 7)})
    rows = torch.zeros(1, 48)
    rows[:, 36:] = 5  # the new bias of `up`; its new scale is 0
    with editing.step(StepRows(rows, 1, ())):
        up, down = model(torch.ones(1, 5))
    assert torch.equal(up, torch.full((1, 12), 5.0))
    assert torch.equal(down, torch.zeros(1, 7))


def test_hooks_work_after_remove_and_install():
    model, (rows, step, owner) = Twin(), step_of([1], [True], 3)
    x = torch.ones(1, 5)
    want = expected(model, x, rows, owner)
    editing = Editing(model)
    editing.install(LAYOUT)
    editing.remove()
    editing.install(LAYOUT)
    with editing.step(step):
        torch.testing.assert_close(model(x), want)


def test_a_site_without_an_adapter_has_no_hook():
    model = Twin()
    Editing(model).install({"down": LAYOUT["down"]})
    assert len(model.up._forward_hooks) == 0


def test_columns_end_after_scale_and_bias():
    assert LAYOUT["up"].stop == 27


def test_a_step_uses_its_own_rows_and_columns_not_those_of_an_earlier_one():
    model = nn.ModuleDict({"site": nn.Identity()})
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 3, 40, generator=generator).unbind()
    h = torch.randn(3, 8, generator=generator)
    editing = Editing(model)
    for rows, start in ((first, 0), (second, 0), (second, 20), (first, 20), (first, 0)):
        editing.install({"site": SiteColumns(start, 8)})
        with editing.step(StepRows(rows, 3, [])):
            got = model["site"](h.clone())
        scale, bias = rows[:, start : start + 8], rows[:, start + 8 : start + 16]
        assert torch.equal(got, torch.addcmul(bias, h, scale))
