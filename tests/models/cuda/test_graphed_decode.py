"""Captured decode steps: the same logits as launched ones, whatever the padding and the mix."""

import dataclasses
import logging

import pytest
import torch
from models.cuda.device_rig import DeviceRig
from reference import edited

from redmux_adapters import Adapter, Edit, red_sites, with_layer_norms
from redmux_server.models.cuda.graphed_decode import batch_sizes

PROMPTS = [[5 + i] * (3 + 7 * i) for i in range(6)]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def rig(tiny_folder):
    return DeviceRig(tiny_folder)


@pytest.fixture
def eager(tiny_folder):
    return DeviceRig(tiny_folder, graphs=False)


@torch.inference_mode()
def plain(base, ids, adapter=None):
    """The last logits of the unchanged model, edited by hand."""
    with edited(base.model, {} if adapter is None else adapter.edits):
        return base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def mixed_requests(rig, base, n):
    """n requests in turn on the base model and on adapters of their own."""
    return [rig.request(PROMPTS[i], base.adapter(i) if i % 3 else None) for i in range(n)]


def test_sizes_are_powers_of_two_and_the_largest_batch():
    assert batch_sizes(1) == [1]
    assert batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(8) == [1, 2, 4, 8]
    assert batch_sizes(64) == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_a_replayed_step_equals_plain_transformers_edited_by_hand(rig, base, n):
    requests = mixed_requests(rig, base, n)
    rig.prefill(*requests)
    for _ in range(3):
        got = rig.decode(*requests)
        for row, r in zip(got, requests, strict=True):
            torch.testing.assert_close(row, plain(base, r.token_ids, r.adapter), **TOLERANCE)
    assert rig.log.count("replay") == 3


def test_sums_and_layer_norms_are_replayed_beside_plain_edits(rig, base):
    sums = with_layer_norms(red_sites(base.model, "res"))
    adapters = [None, base.adapter(1), dataclasses.replace(base, ffn=sums).adapter(2)]
    requests = [rig.request(PROMPTS[i], adapters[i % 3]) for i in range(6)]
    rig.prefill(*requests)
    got = rig.decode(*requests)
    for row, r in zip(got, requests, strict=True):
        torch.testing.assert_close(row, plain(base, r.token_ids, r.adapter), **TOLERANCE)
    assert "replay" in rig.log


@pytest.mark.parametrize("n", [1, 3, 6])
def test_a_replayed_step_equals_a_launched_one(rig, eager, base, n):
    rows = []
    for r in (rig, eager):
        requests = mixed_requests(r, base, n)
        r.prefill(*requests)
        rows.append(torch.cat([r.decode(*requests) for _ in range(2)]))
    torch.testing.assert_close(*rows, **TOLERANCE)
    assert "replay" in rig.log
    assert not eager.log


def test_every_size_is_captured_once_and_the_largest_first(rig):
    sizes = []
    decoder = rig.runner._decoder
    logits = decoder.logits
    decoder.logits = lambda step, table: sizes.append(len(step.ids)) or logits(step, table)
    rig.runner.prepare()
    assert list(dict.fromkeys(sizes)) == [6, 4, 2, 1]
    assert rig.log == ["capture"] * 4


def test_adapters_that_come_and_go_need_no_new_capture(rig, base):
    requests = mixed_requests(rig, base, 4)
    rig.prefill(*requests)
    rig.decode(*requests)
    for seed in range(20, 30):
        newcomer = rig.request([1, 2, 3], base.adapter(seed), max_tokens=2)
        rig.prefill(newcomer)
        row = rig.decode(newcomer)[0]
        torch.testing.assert_close(
            row, plain(base, newcomer.token_ids, newcomer.adapter), **TOLERANCE
        )
        rig.pool.release(newcomer.blocks)
        rig.bank.release(newcomer.slot)
    assert rig.log.count("capture") == 4


def attention_adapter(base, rig):
    """Edits a site of a kind that no adapter of the FFN has."""
    site = "model.layers.1.self_attn.o_proj"
    dim = rig.bank._site_dims[site]
    generator = torch.Generator().manual_seed(4)
    edit = Edit(*torch.randn(2, dim, generator=generator).unbind())
    return Adapter(base_fingerprint=base.fingerprint, edits={site: edit})


def test_an_adapter_of_new_sites_makes_new_graphs_and_harms_nobody(rig, base):
    requests = mixed_requests(rig, base, 3)
    rig.prefill(*requests)
    rig.decode(*requests)
    newcomer = rig.request([9, 8, 7], attention_adapter(base, rig))
    rig.prefill(newcomer)
    everybody = [*requests, newcomer]
    got = rig.decode(*everybody)
    for row, r in zip(got, everybody, strict=True):
        torch.testing.assert_close(row, plain(base, r.token_ids, r.adapter), **TOLERANCE)
    assert rig.log.count("capture") == 8
    assert "model.layers.0.self_attn.o_proj" in rig.bank.layout  # the whole kind, so only once


def test_padding_writes_into_the_dummy_block_alone(rig, base):
    requests = mixed_requests(rig, base, 3)
    rig.prefill(*requests)
    others = set(range(rig.cache.num_blocks)) - {b for r in requests for b in r.blocks}
    layer = rig.cache.layers[0]
    before = layer.keys.clone()
    rig.decode(*requests)
    assert torch.equal(layer.keys[sorted(others)], before[sorted(others)])
    for r in requests:  # and a request's own block in one place only
        block = r.blocks[(r.num_computed - 1) // 32]
        changed = (layer.keys[block] != before[block]).any(-1).any(-1).nonzero().flatten()
        assert changed.tolist() == [(r.num_computed - 1) % 32]


def test_padded_rows_are_the_identity_with_one_key_of_the_dummy_block(rig, base):
    requests = mixed_requests(rig, base, 3)
    rig.prefill(*requests)
    seen = rig.runner._decode._steps[4][0].tensors  # the buffers that the graph of four reads
    rig.decode(*requests)
    assert seen.rows.tolist() == [*rig.bank.table_rows([0, *(r.slot for r in requests[1:])]), 0]
    assert seen.paged.slots[3] == rig.cache.dummy_block * rig.cache.block_size
    assert seen.paged.blocks[3].tolist() == [rig.cache.dummy_block, 0, 0]
    assert seen.paged.key_counts.tolist() == [*(r.num_computed for r in requests), 1]
    assert seen.paged.starts.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_what_the_cache_held_before_reaches_nobody(tiny_folder, base, poison):
    rows = []
    for fill in (None, poison):
        rig = DeviceRig(tiny_folder)
        if fill is not None:
            rig.cache.poison(range(rig.cache.num_blocks + 1), fill)
        requests = mixed_requests(rig, base, 5)
        rig.prefill(*requests)
        rows.append(rig.decode(*requests))
    assert rows[1].isfinite().all()
    torch.testing.assert_close(*rows)


def test_a_broken_request_harms_no_neighbour_in_its_graph(rig, base):
    bad = base.adapter(1)
    site = next(iter(bad.edits))
    bad.edits[site].bias[0] = float("inf")
    broken, well = rig.request(PROMPTS[2], bad), rig.request(PROMPTS[3], base.adapter(2))
    rig.prefill(broken, well)
    got = rig.decode(broken, well)
    assert not got[0].isfinite().all()
    torch.testing.assert_close(got[1], plain(base, well.token_ids, well.adapter), **TOLERANCE)


def test_a_smaller_step_sees_nothing_of_a_larger_one_before(rig, base):
    many = mixed_requests(rig, base, 4)
    rig.prefill(*many)
    rig.decode(*many)
    got = rig.decode(many[0], many[2], many[1])  # the size of four again, in another order
    for row, r in zip(got, (many[0], many[2], many[1]), strict=True):
        torch.testing.assert_close(row, plain(base, r.token_ids, r.adapter), **TOLERANCE)


def test_logits_belong_to_the_caller(rig, base):
    requests = mixed_requests(rig, base, 2)
    rig.prefill(*requests)
    first = rig.decode(*requests)
    kept = first.clone()
    rig.decode(*requests)
    assert torch.equal(first, kept)


def test_prefills_and_mixed_steps_are_launched(rig, base):
    one, two = mixed_requests(rig, base, 2)
    rig.prefill(one)
    one.token_ids.append(3)
    got = rig.step((one, 1), (two, 4))  # a decode beside a chunk that draws nothing
    assert "replay" not in rig.log
    torch.testing.assert_close(got[0], plain(base, one.token_ids), **TOLERANCE)
    assert len(got) == 1


def test_a_chunk_of_one_token_that_draws_nothing_is_launched(rig):
    request = rig.request([4, 5, 6])
    assert rig.step((request, 1)).shape == (0, 260)
    assert "replay" not in rig.log


def test_more_requests_than_captured_are_launched(tiny_folder, base):
    rig = DeviceRig(tiny_folder, max_running=2)
    requests = [rig.request(PROMPTS[i]) for i in range(3)]
    rig.prefill(*requests)
    got = rig.decode(*requests)
    assert "replay" not in rig.log
    torch.testing.assert_close(got[2], plain(base, requests[2].token_ids), **TOLERANCE)


def test_a_batch_reads_the_blocks_that_its_requests_have_now(rig, base):
    """They grow, become those of a twin, and are others once a request was sent back."""
    requests = mixed_requests(rig, base, 3)
    size = rig.cache.block_size
    for request in requests:
        rig.pool.release(request.blocks)
        request.blocks = rig.pool.allocate(len(request.token_ids))
    rig.prefill(*requests)
    for number in range(2 * size + 1):
        for request in requests:
            if len(request.blocks) * size < len(request.token_ids) + 1:
                request.blocks = [*request.blocks, *rig.pool.allocate(1)]
        got = rig.decode(*requests)
        assert rig.log[-1] == "replay"
        if number == size + 1:  # everything of the first one moves
            others = rig.pool.allocate(len(requests[0].blocks) * size)
            for layer in rig.cache.layers:
                for pages in (layer.keys, layer.values):
                    pages[others] = pages[requests[0].blocks]
                    pages[requests[0].blocks] = float("nan")
            requests[0].blocks = others
    for row, r in zip(got, requests, strict=True):
        torch.testing.assert_close(row, plain(base, r.token_ids, r.adapter), **TOLERANCE)


def test_contexts_up_to_the_limit_are_replayed(rig, base):
    request = rig.request([1 + i % 200 for i in range(94)], base.adapter(3), max_tokens=2)
    rig.prefill(request)
    got = rig.decode(request)[0]
    torch.testing.assert_close(got, plain(base, request.token_ids, request.adapter), **TOLERANCE)
    assert rig.log[-1] == "replay"


def test_a_capture_that_fails_leaves_steps_launched_and_right(rig, base, caplog):
    def fail():
        raise RuntimeError("operation not permitted when stream is capturing")

    rig.runner._graphs = type(rig.runner._graphs)(fail, 6, 3)
    requests = mixed_requests(rig, base, 2)
    with caplog.at_level(logging.ERROR):
        rig.prefill(*requests)
    assert "capturing CUDA graphs failed" in caplog.text
    caplog.clear()
    got = rig.decode(*requests)
    assert not caplog.records  # said once
    for row, r in zip(got, requests, strict=True):
        torch.testing.assert_close(row, plain(base, r.token_ids, r.adapter), **TOLERANCE)
