"""What a model on a GPU runs with: attention, edits, graphs, each chosen once with its reason."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux_adapters import ffn_sites
from redmux_server.engine.bank import AdapterBank
from redmux_server.models.device_runner import DeviceRunner, Graphs
from redmux_server.models.editing import RowEdit
from redmux_server.models.graphed_decode import CudaCapture
from redmux_server.models.kvcache import LayerShape
from redmux_server.models.paged_cache import PagedAttention, PagedKVCache
from redmux_server.models.paged_choice import candidates, choose_attention
from redmux_server.models.row_edit import choose_edit
from redmux_server.models.selfcheck import MAX_CONTEXT, MAX_RUNNING, Reference, SelfCheck

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceEngine:
    """What `DeviceRuntime.assemble` has put together and checked."""

    runner: DeviceRunner
    bank: AdapterBank
    bit_identical: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeviceRuntime:
    """The parts that `load_causal` puts together for a device other than the CPU."""

    attention: PagedAttention
    edit: RowEdit
    device: torch.device
    dtype: torch.dtype
    num_threads: int
    uses_graphs: bool
    reasons: tuple[str, ...]

    @staticmethod
    def choose(
        shapes: Sequence[LayerShape], device: torch.device, dtype: torch.dtype, num_threads: int
    ) -> "DeviceRuntime":
        """Returns what is there on this device and was found to compute rightly."""
        tried = candidates(device, dtype)
        attention, attention_reason = choose_attention(tried, shapes, device, dtype)
        edit, edit_reason = choose_edit(device, dtype)
        return DeviceRuntime(
            attention, edit, device, dtype, num_threads, attention.can_graph,
            (attention_reason, edit_reason),
        )  # fmt: skip

    def make_cache(self, shapes: Sequence[LayerShape], num_tokens: int) -> PagedKVCache:
        """Returns an empty cache of at least this many tokens."""
        num_blocks = -(-num_tokens // self.attention.block_size)
        return PagedKVCache(shapes, num_blocks, self.attention, self.device, self.dtype)

    def assemble(
        self,
        model: Any,
        cache: PagedKVCache,
        sites: Mapping[str, int],
        expected: Reference,
        *,
        max_running: int,
        max_context: int,
        bank_bytes: int,
    ) -> DeviceEngine:
        """Returns bank and runner for this model, whose attention runs over `cache` already.

        The bank is laid out for the FFN sites, so that their adapters never move its table. Without
        graphs if capturing or checking them fails; raises FailedPreconditionError if the check
        fails without them, too.
        """
        try:
            bit_identical = self._check(model, cache, sites, expected)
            bank = AdapterBank(
                sites, device=self.device, dtype=self.dtype, max_bytes=bank_bytes,
                min_slots=max_running + 1, preallocated=True,
            )  # fmt: skip
            bank.reserve(_expected_sites(model))
            runner = self._runner(model, cache, bank, max_running, max_context)
        except (RuntimeError, FailedPreconditionError) as err:
            if not self.uses_graphs:
                raise
            logger.warning("CUDA graphs are not used: %s", err)
            why = f"decode steps: launched eagerly (graphs failed: {err})".splitlines()[0][:200]
            return replace(self, uses_graphs=False, reasons=(*self.reasons, why)).assemble(
                model, cache, sites, expected,
                max_running=max_running, max_context=max_context, bank_bytes=bank_bytes,
            )  # fmt: skip
        reasons = self.reasons
        if self.uses_graphs:
            reasons += ("decode steps: CUDA graphs, one per batch size",)
        elif not self.attention.can_graph:
            reasons += ("decode steps: launched eagerly (this attention has no fixed shape)",)
        return DeviceEngine(runner, bank, bit_identical, reasons)

    def _check(
        self, model: Any, cache: PagedKVCache, sites: Mapping[str, int], expected: Reference
    ) -> bool:
        def make(bank: AdapterBank) -> DeviceRunner:
            return self._runner(model, cache, bank, MAX_RUNNING, MAX_CONTEXT)

        with contextlib.closing(SelfCheck(make, sites, self.device, self.dtype)) as check:
            check.compare(expected)
            return check.is_bit_identical(expected.prompts)

    def _runner(
        self,
        model: Any,
        cache: PagedKVCache,
        bank: AdapterBank,
        max_running: int,
        max_context: int,
    ) -> DeviceRunner:
        graphs = Graphs(CudaCapture, max_running, -(-max_context // cache.block_size))
        runner = DeviceRunner(
            model, cache, bank, self.num_threads,
            edit=self.edit, graphs=graphs if self.uses_graphs else None,
        )  # fmt: skip
        runner.prepare()
        return runner


def _expected_sites(model: Any) -> Mapping[str, int]:
    """Returns RED's own sites, none for an architecture where they are not known."""
    try:
        return ffn_sites(model)
    except InvalidArgumentError:
        return {}
