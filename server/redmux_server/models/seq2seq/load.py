"""Load an encoder-decoder model and make it ready to serve."""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from redmux.errors import FailedPreconditionError
from redmux_adapters import (
    Adapter,
    editable_sites,
    fingerprint,
    load_seq2seq_base,
    with_layer_norms,
)
from redmux_server.config import ServerConfig
from redmux_server.device import Choices
from redmux_server.engine.bank import AdapterBank
from redmux_server.engine.request import Request, SamplingParams, Work
from redmux_server.models.base_model import BaseModel
from redmux_server.models.cpu.accelerate import pack_linears
from redmux_server.models.cpu.packed_linear import PackedLinear
from redmux_server.models.cpu.precision import check_not_rounded
from redmux_server.models.cpu.token_masks import choose_bar
from redmux_server.models.editing import Editing
from redmux_server.models.kvcache import BLOCK, check_memory, total_bytes
from redmux_server.models.proving import random_edits, relative_error
from redmux_server.models.seq2seq.runner import Seq2SeqRunner
from redmux_server.models.seq2seq.t5 import T5
from redmux_server.models.text import TextCodec

logger = logging.getLogger(__name__)

_DEFAULT_CONTEXT = 1024  # of the source and of the answer together; T5 itself has no limit
_TOLERANCE = 1e-4  # of the largest logit
_SOURCES = (5, 33, 1, 12)  # lengths of the start-up check


def load_seq2seq(config: ServerConfig, choices: Choices) -> BaseModel:
    """Returns the configured T5 or mT5, ready to serve and checked against its plain self.

    Raises FailedPreconditionError for other architectures, devices and dtypes.
    """
    if choices.device.type != "cpu" or choices.dtype != torch.float32:
        raise FailedPreconditionError(
            f"encoder-decoder models are served on cpu in float32, not on {choices.device} in "
            f"{choices.dtype}; set device and dtype"
        )
    check_not_rounded(config, "an encoder-decoder")
    model, tokenizer = load_seq2seq_base(config.model, choices.dtype, config.tokenizer)
    if model.config.model_type not in ("t5", "mt5"):
        raise FailedPreconditionError(
            f"{model.config.model_type!r} models cannot be served; of the encoder-decoders, "
            f"t5 and mt5 can"
        )
    identity = fingerprint(model)
    sites = with_layer_norms(editable_sites(model))
    expected = _plain_logits(model)
    pack_linears(model)
    bank = AdapterBank(
        sites, device=choices.device, dtype=choices.dtype, max_bytes=config.bank_bytes,
        min_slots=config.max_running + 1,
    )  # fmt: skip
    editing = Editing(model)
    runner = Seq2SeqRunner(T5(model, editing.edit), editing, bank, choices.num_threads)
    error, bit_identical = _check(model, sites, expected, choices)
    context = config.max_context or _DEFAULT_CONTEXT
    per_token = 2 * 4 * model.config.num_heads * model.config.d_kv * len(model.decoder.block)
    fitting = total_bytes(choices.device) // (4 * per_token * BLOCK) * BLOCK
    tokens = config.kv_cache_tokens or min(config.max_running * context, fitting)
    check_memory(config.kv_cache_tokens, tokens, per_token, choices.device)
    num_blocks = -(-tokens // BLOCK)
    max_context = min(context, num_blocks * BLOCK) - 1
    reasons = [
        *choices.reasons,
        f"encoder-decoder: packed linears, logits within {error:.1e} of the plain model's largest",
        f"bit-identical in any batch: {'yes, checked at start' if bit_identical else 'no'}",
        "prefix cache: off (the answer's tokens depend on the source)",
    ]
    for reason in reasons:
        logger.info("%s", reason)
    return BaseModel(
        runner=runner, bank=bank,
        codec=TextCodec(tokenizer, model.generation_config, reads_prompts=True),
        fingerprint=identity, architecture=model.config.architectures[0], sites=sites,
        hidden_size=model.config.d_model, vocab_size=model.config.vocab_size,
        # One place is the decoder's start.
        max_context=max_context,
        # A source is encoded in one piece, beside a token of everyone who runs already.
        max_batch_tokens=max(config.max_batch_tokens, max_context + 1 + config.max_running),
        num_blocks=num_blocks, block_size=BLOCK,
        kv_bytes_per_token=per_token,
        device=choices.device, dtype=choices.dtype,
        bar=choose_bar(choices.device, choices.dtype),
        linears=[m for m in model.modules() if isinstance(m, PackedLinear)],
        bit_identical=bit_identical, reasons=reasons,
        decoder_start=model.config.decoder_start_token_id,
    )  # fmt: skip


def _sources(model: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in _SOURCES]


@torch.inference_mode()
def _plain_logits(model: Any) -> list[Tensor]:
    """Returns [2, vocab] per source: what follows the start token, and the same token again."""
    start = model.config.decoder_start_token_id
    return [
        model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[start, start]]),
              use_cache=False).logits[0]
        for ids in _sources(model)
    ]  # fmt: skip


def _check(
    model: Any, sites: dict[str, int], expected: list[Tensor], choices: Choices
) -> tuple[float, bool]:
    """Returns the largest error, and whether rows have the same bits alone and mixed."""
    bank = AdapterBank(sites, device=choices.device, dtype=choices.dtype, max_bytes=0, min_slots=8)
    editing = Editing(model)
    runner = Seq2SeqRunner(T5(model, editing.edit), editing, bank, choices.num_threads)
    runner.enter_thread()
    start = model.config.decoder_start_token_id

    def run(jobs: Sequence[tuple[list[int], Adapter | None]]) -> Tensor:
        requests = [_request(ids, start, adapter) for ids, adapter in jobs]
        for r in requests:
            if r.adapter is not None:
                r.slot = bank.acquire(r.adapter.digest, r.adapter.edits)
        rows = []
        for _ in range(2):
            rows.append(runner.forward([Work(r, 1) for r in requests]))
            for r in requests:
                r.num_computed += 1
                r.token_ids.append(start)
        return torch.stack(rows, 1)  # [requests, 2, vocab]

    sources = _sources(model)
    error = 0.0
    for row, want in zip(run([(ids, None) for ids in sources]), expected, strict=True):
        error = max(error, relative_error(row, want))
    if not error < _TOLERANCE:
        raise FailedPreconditionError(
            f"the packed engine differs from the plain model by {error:.1e} relative to the "
            f"largest logit (allowed: {_TOLERANCE:g}): this model cannot be served"
        )
    adapters = [Adapter("self-check", random_edits(sites, seed)) for seed in range(2)]
    jobs = [(ids, [None, *adapters][i % 3]) for i, ids in enumerate(sources)]
    alone = torch.cat([run([job]) for job in jobs])
    mixes = [range(len(jobs)), range(len(jobs))[::-1], *itertools.pairwise(range(len(jobs)))]
    same = all(torch.equal(run([jobs[i] for i in mix]), alone[list(mix)]) for mix in mixes)
    editing.remove()
    return error, same


def _request(source: list[int], start: int, adapter: Adapter | None) -> Request:
    return Request(
        prompt_ids=[start], max_tokens=2, sampling=SamplingParams(), stop_token_ids=frozenset(),
        tenant="", adapter=adapter, logprobs=False, sink=lambda event: None, source_ids=source,
    )  # fmt: skip
