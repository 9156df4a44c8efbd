"""DeviceRunner: the forward pass on a GPU, with nothing of a step computed on the host twice."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redmux_server.engine.bank import AdapterBank
from redmux_server.engine.request import Work
from redmux_server.models.cuda.decode_ways import Seconds, cuda_seconds, summary
from redmux_server.models.cuda.decoder import DeviceDecoder, StepTensors
from redmux_server.models.cuda.graphed_decode import Capture, GraphedDecode, batch_sizes
from redmux_server.models.cuda.paged_cache import PagedKVCache
from redmux_server.models.cuda.paged_step import BlockTable, HostIndex, Ints, PagedStep, to_device
from redmux_server.models.editing import rows_of_tokens, slots_of
from redmux_server.models.kvcache import KVCache, Segment

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Graphs:
    """What decode steps are captured for."""

    new_capture: Callable[[], Capture]  # a fresh memory pool for every set of graphs
    max_running: int
    max_blocks: int  # most cache blocks of a request
    ways: frozenset[str] | None = None  # names of decode ways to choose from; None for all
    seconds: Seconds = cuda_seconds  # times a replay


@dataclass(frozen=True, slots=True, eq=False)
class _HostStep:
    ids: Ints  # [tokens]
    positions: Ints  # [tokens]
    rows: Ints  # [tokens] of the bank's table
    last: Ints  # [wanted] tokens whose logits are wanted
    index: HostIndex


class DeviceRunner:
    """Runs a step with the adapters read from the bank's table and pages from a PagedKVCache.

    Steps of decodes replay a graph if `graphs` is given, everything else is launched eagerly. The
    graphs hold the bank's table by its address and the sites of its layout; `forward` captures
    anew when the bank has moved its table, which a preallocated bank does only when an adapter
    brings sites of a kind that none had (see AdapterBank): that step takes seconds. Should that
    fail, steps are launched eagerly from then on.
    """

    def __init__(
        self,
        model: Any,
        decoder: DeviceDecoder,
        cache: PagedKVCache,
        bank: AdapterBank,
        num_threads: int,
        *,
        graphs: Graphs | None,
    ) -> None:
        self.model = model
        self.cache: KVCache = cache
        self._pages = cache
        self._decoder = decoder
        self._bank = bank
        self._num_threads = num_threads
        self._graphs = graphs
        self._decode: GraphedDecode | None = None
        self._table: Tensor | None = None  # for which hooks and graphs were made
        self._blocks = BlockTable()

    def enter_thread(self) -> None:
        """Sets the number of compute threads, which is a property of the calling thread."""
        torch.set_num_threads(self._num_threads)

    def forget_sites(self) -> None:
        """See CachedRunner."""
        self._decoder.forget_sites()

    @property
    def ways(self) -> str:
        """Which way computes the captured sizes; empty where nothing is captured."""
        return "" if self._decode is None else summary(self._decode.chosen)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Installs the hooks of the bank's layout and captures, unless both stand already.

        Raises what the capture raises, with the runner left to launch eagerly.
        """
        if self._bank.table is self._table:
            return
        self._table = self._bank.table
        self._decoder.install(self._bank.layout)
        self._decode = None  # the old graphs' memory goes before the new ones take theirs
        if self._graphs is not None:
            graphs, self._graphs = self._graphs, None
            self._decode = self._capture(graphs)
            self._graphs = graphs

    @torch.inference_mode()
    def forward(self, work: Sequence[Work]) -> Tensor:
        """See Runner.forward."""
        self._prepare_or_go_on()
        if self._decode is not None and self._decode.fits(len(work)) and _is_decode(work):
            return self._replay(self._decode, work)
        step = self._host_step(work)
        tensors = self._tensors(step)
        return self._decoder.logits(tensors, self._bank.table)[: len(step.last)]

    @torch.inference_mode()
    def hidden(self, work: Sequence[Work]) -> Sequence[Tensor]:
        """See Runner.hidden; always launched eagerly."""
        self._prepare_or_go_on()
        step = self._tensors(self._host_step(work))
        states = self._decoder.hidden(step, self._bank.table)
        return torch.split(states, [item.count for item in work])

    def _prepare_or_go_on(self) -> None:
        try:
            self.prepare()
        except RuntimeError:
            logger.exception("capturing CUDA graphs failed; steps are launched eagerly from now on")

    def _replay(self, decode: GraphedDecode, work: Sequence[Work]) -> Tensor:
        requests = [item.request for item in work]
        blocks = self._blocks.of([r.blocks for r in requests])
        positions = np.array([r.num_computed for r in requests], np.int32)
        ids = np.array([r.token_ids[r.num_computed] for r in requests], np.int32)
        rows = np.array(self._bank.table_rows(slots_of(work, [w.edited for w in work])), np.int32)
        index = HostIndex.of_decodes(positions, blocks, self.cache.block_size)
        return decode.run(ids, positions, rows, index)

    def _host_step(self, work: Sequence[Work]) -> _HostStep:
        segments: list[Segment] = []
        ids: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for item in work:
            r, first = item.request, item.request.num_computed
            segments.append(Segment(len(ids), item.count, first, r.blocks))
            last += [len(ids) + i for i in item.wanted]
            ids += item.token_ids
            positions += range(first, first + item.count)
        edited = [item.edited for item in work]
        rows = rows_of_tokens(
            self._bank.table_rows(slots_of(work, edited)), [item.count for item in work], edited
        )
        index = HostIndex.of(segments, self.cache.block_size)
        return _HostStep(
            np.array(ids, np.int32), np.array(positions, np.int32), rows,
            np.array(last, np.int32), index,
        )  # fmt: skip

    def _tensors(self, step: _HostStep) -> StepTensors:
        # One row at least: an empty selection is not what every model expects.
        last = step.last if len(step.last) else np.zeros(1, np.int32)
        arrays = [step.ids, step.positions, step.rows, last, *step.index.arrays()]
        ids, positions, rows, kept, *index = to_device(arrays, self.model.device)
        paged = PagedStep.of(step.index, index)
        return StepTensors(ids.long(), positions.long(), rows, paged, kept.long())

    def _capture(self, graphs: Graphs) -> GraphedDecode:
        embedding = self.model.get_output_embeddings().weight
        ways = self._decoder.decode_ways()
        if graphs.ways is not None:
            # One of them can be missing with the sites of the bank's layout; the first never is.
            ways = [way for way in ways if way.name in graphs.ways] or ways[:1]
        return GraphedDecode(
            self._pages,
            ways,
            self._bank.table,
            graphs.new_capture(),
            graphs.seconds,
            sizes=batch_sizes(graphs.max_running),
            max_blocks=graphs.max_blocks,
            vocab_size=embedding.shape[0],
            device=self.model.device,
            dtype=self.model.dtype,
        )


def _is_decode(work: Sequence[Work]) -> bool:
    """Whether there is one token per request and the logits of all of them are wanted."""
    return all(w.count == 1 and w.request.first_wanted <= w.request.num_computed for w in work)
