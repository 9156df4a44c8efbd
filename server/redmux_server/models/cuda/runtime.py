"""What a model on a GPU runs with: attention, edits, graphs, each chosen once with its reason."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux_adapters import ffn_sites
from redmux_server.engine.bank import AdapterBank
from redmux_server.models.causal.selfcheck import MAX_CONTEXT, MAX_RUNNING, Reference, SelfCheck
from redmux_server.models.cuda.decode_ways import Seconds, cuda_seconds
from redmux_server.models.cuda.decoder import (
    DeviceDecoder,
    FusedDeviceDecoder,
    HookedDecoder,
    why_not_fused_on_device,
)
from redmux_server.models.cuda.few_rows import few_row_products
from redmux_server.models.cuda.graphed_decode import CudaCapture
from redmux_server.models.cuda.paged_cache import PagedAttention, PagedKVCache
from redmux_server.models.cuda.paged_choice import candidates, choose_attention
from redmux_server.models.cuda.row_edit import choose_edit, torch_edit
from redmux_server.models.cuda.runner import DeviceRunner, Graphs
from redmux_server.models.editing import RowEdit
from redmux_server.models.kvcache import LayerRule, LayerShape

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceEngine:
    """What `DeviceRuntime.assemble` has put together and checked."""

    runner: DeviceRunner
    bank: AdapterBank
    bit_identical: bool
    reasons: tuple[str, ...]


# From names of decode ways, bank, most requests and most tokens of one.
_Make = Callable[[frozenset[str], AdapterBank, int, int], DeviceRunner]


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
    seconds: Seconds = cuda_seconds  # times captured steps, to choose between ways

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
        rules: Sequence[LayerRule],
        cache: PagedKVCache,
        sites: Mapping[str, int],
        expected: Reference,
        *,
        max_running: int,
        max_context: int,
        bank_bytes: int,
    ) -> DeviceEngine:
        """Returns bank and runner for this model, whose attention runs over `cache` already.

        The fastest that computes what the model computes: fused kernels before transformers' own
        modules, captured graphs before eager launches, and for each captured batch size the way
        that is fastest. The bank is laid out for the FFN sites, so that their adapters never move
        its table. Raises FailedPreconditionError if even the plainest fails its check.
        """
        ffn = _expected_sites(model)
        refused: list[str] = []
        for decoder, reason in self._decoders(model, rules, cache, max_context):
            for uses_graphs in (True, False) if self.uses_graphs else (False,):
                make = functools.partial(self._runner, model, decoder, cache, uses_graphs)
                first, *others = [way.name for way in decoder.decode_ways()]
                check = functools.partial(self._check, make, ffn or sites, expected)
                try:
                    bit_identical = check(frozenset({first}))
                    ways = self._checked(others if uses_graphs else [], check, refused)
                    bank = AdapterBank(
                        sites, device=self.device, dtype=self._table_dtype, max_bytes=bank_bytes,
                        min_slots=max_running + 1, preallocated=True,
                    )  # fmt: skip
                    bank.reserve(ffn)
                    runner = make(ways | {first}, bank, max_running, max_context)
                except (RuntimeError, FailedPreconditionError) as err:
                    what = f"not used: {reason}, {_launches(uses_graphs)}: {err}"
                    logger.warning("%s", what)
                    refused.append(what.splitlines()[0][:250])
                    failed = err
                    continue
                launches = f"decode steps: {_launches(uses_graphs)}"
                if ways:
                    launches += f", {runner.ways}"
                if not self.attention.can_graph:
                    launches += " (this attention has no fixed shape)"
                reasons = (*self.reasons, reason, launches, *refused)
                return DeviceEngine(runner, bank, bit_identical and not ways, reasons)
        raise failed

    @property
    def _table_dtype(self) -> torch.dtype:
        # A scale near 1 has steps of 0.008 in bf16; the kernels take vectors as they were trained.
        return self.dtype if self.edit is torch_edit else torch.float32

    def _decoders(
        self, model: Any, rules: Sequence[LayerRule], cache: PagedKVCache, max_context: int
    ) -> Iterator[tuple[DeviceDecoder, str]]:
        """Yields decoders, the fastest first, and what is to be said of each."""
        why = why_not_fused_on_device(model, rules)
        if self.edit is torch_edit:
            why = "its kernels are Triton's"
        hooked = HookedDecoder(model, cache, self.edit)
        if why is None:
            positions = max(max_context, MAX_CONTEXT)
            try:
                few_rows, why_not = few_row_products(model)
                fused = FusedDeviceDecoder(model, rules, cache, positions, hooked, few_rows)
                lacks = f" (no few-row products: {why_not})" if why_not else ""
                yield fused, f"layers: fused by Triton{lacks}"
            except (ImportError, ValueError) as err:
                why = str(err)
        yield hooked, "layers: transformers' own" + (f" ({why})" if why else "")

    def _runner(
        self, model: Any, decoder: DeviceDecoder, cache: PagedKVCache, uses_graphs: bool,
        ways: frozenset[str], bank: AdapterBank, max_running: int, max_context: int,
    ) -> DeviceRunner:  # fmt: skip
        max_blocks = -(-max_context // cache.block_size)
        graphs = Graphs(CudaCapture, max_running, max_blocks, ways, self.seconds)
        runner = DeviceRunner(
            model, decoder, cache, bank, self.num_threads, graphs=graphs if uses_graphs else None
        )
        runner.prepare()
        return runner

    def _checked(
        self, ways: Sequence[str], check: Callable[[frozenset[str]], bool], refused: list[str]
    ) -> frozenset[str]:
        """Returns those that compute what the model computes; why others do not goes to refused."""
        passed = set()
        for way in ways:
            try:
                check(frozenset({way}))
                passed.add(way)
            except Exception as err:  # a kernel that does not compile must not stop the server
                what = f"not used: {way}: {type(err).__name__}: {err}"
                logger.warning("%s", what)
                refused.append(what.splitlines()[0][:250])
        return frozenset(passed)

    def _check(
        self, make: _Make, sites: Mapping[str, int], expected: Reference, ways: frozenset[str]
    ) -> bool:
        def runner(bank: AdapterBank) -> DeviceRunner:
            return make(ways, bank, MAX_RUNNING, MAX_CONTEXT)

        with contextlib.closing(SelfCheck(runner, sites, self.device, self.dtype)) as check:
            check.compare(expected)
            return check.is_bit_identical(expected.prompts)


def _launches(uses_graphs: bool) -> str:
    return "CUDA graphs, one per batch size" if uses_graphs else "launched eagerly"


def _expected_sites(model: Any) -> Mapping[str, int]:
    """Returns RED's own sites, none for an architecture where they are not known."""
    try:
        return ffn_sites(model)
    except InvalidArgumentError:
        return {}
