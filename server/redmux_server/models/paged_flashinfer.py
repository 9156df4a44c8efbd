"""Paged attention by FlashInfer (written against flashinfer-python 0.7.2)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from redmux_server.models.paged_cache import AttentionRule
from redmux_server.models.paged_step import HostIndex, PagedStep

_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends
_HEAD_DIMS = (64, 128, 256)
# It stages into pages and zeroes what lies behind the last key; FlashAttention 3 lets a NaN there
# through (flash-attention#1745), and pages are reused by other tenants.
_BACKEND = "fa2"


class FlashInferAttention:
    """A wrapper of FlashInfer for each rule of attention: one for steps of decodes, one for mixed.

    FlashInfer plans on the host before a step's kernels run. Which rules the layers have is known
    only once they call, so a step's first call of a rule plans it. A static step has wrappers with
    fixed buffers per batch size; they come into being in the warm-up before its capture, and `plan`
    renews all of them before every replay.
    """

    block_size = 32
    reads_blocks = False
    can_graph = True

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raises ImportError without FlashInfer and ValueError for a dtype it cannot do."""
        import flashinfer

        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"it has no {str(dtype).removeprefix('torch.')}")
        self._flashinfer: Any = flashinfer
        self._device = device
        self._dtype = dtype
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._eager: dict[tuple[AttentionRule, bool], Any] = {}  # (rule, only decodes) -> wrapper
        self._static: dict[int, dict[AttentionRule, Any]] = {}  # batch size -> rule -> wrapper
        self._planned: set[tuple[AttentionRule, bool]] = set()  # in this step
        self._copies = _event() if device.type == "cuda" else None

    def plan(self, step: PagedStep) -> None:
        """See PagedAttention.plan."""
        # Plans are staged in pinned buffers of the wrappers: not before the last copy has left.
        if self._copies is not None:
            self._copies.synchronize()
        self._planned.clear()
        if step.is_static:
            for rule, wrapper in self._static.get(len(step.host.counts), {}).items():
                self._plan_decode(wrapper, rule, step.host)

    def __call__(
        self, step: PagedStep, rule: AttentionRule, query: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """See PagedAttention."""
        if step.is_static:
            wrapper = self._static_wrapper(step, rule, keys.shape[0])
        else:
            wrapper = self._wrapper(step, rule)
        out: Tensor = wrapper.run(query, (keys, values))
        return out

    def _wrapper(self, step: PagedStep, rule: AttentionRule) -> Any:
        is_decode = step.max_count == 1
        key = (rule, is_decode)
        if key not in self._eager:
            if rule.shape.head_dim not in _HEAD_DIMS:
                raise ValueError(f"it has no kernels for heads of {rule.shape.head_dim}")
            self._eager[key] = (
                self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                    self._workspace, "NHD", use_tensor_cores=_uses_tensor_cores(rule),
                    backend=_BACKEND,
                )
                if is_decode
                else self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                    self._workspace, "NHD", backend=_BACKEND
                )
            )  # fmt: skip
        wrapper = self._eager[key]
        if key not in self._planned:
            plan = self._plan_decode if is_decode else self._plan_prefill
            plan(wrapper, rule, step.host)
            self._planned.add(key)
        return wrapper

    def _static_wrapper(self, step: PagedStep, rule: AttentionRule, num_pages: int) -> Any:
        batch_size = len(step.host.counts)
        wrappers = self._static.setdefault(batch_size, {})
        if rule not in wrappers:
            wrappers[rule] = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=_uses_tensor_cores(rule),
                paged_kv_indptr_buffer=self._buffer(batch_size + 1),
                # Every page once, and the dummy page in each padded row.
                paged_kv_indices_buffer=self._buffer(num_pages + batch_size),
                paged_kv_last_page_len_buffer=self._buffer(batch_size),
                backend=_BACKEND,
            )
            self._plan_decode(wrappers[rule], rule, step.host)
        return wrappers[rule]

    def _buffer(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, device=self._device)

    def _plan_decode(self, wrapper: Any, rule: AttentionRule, host: HostIndex) -> None:
        indptr, indices, last_page_len = _pages(host, self.block_size)
        wrapper.plan(
            indptr,
            indices,
            last_page_len,
            rule.shape.num_heads,
            rule.shape.num_kv_heads,
            rule.shape.head_dim,
            self.block_size,
            **self._options(rule),
        )
        self._note_copies()

    def _plan_prefill(self, wrapper: Any, rule: AttentionRule, host: HostIndex) -> None:
        indptr, indices, last_page_len = _pages(host, self.block_size)
        wrapper.plan(
            _indptr(host.counts),
            indptr,
            indices,
            last_page_len,
            rule.shape.num_heads,
            rule.shape.num_kv_heads,
            rule.shape.head_dim,
            self.block_size,
            causal=True,
            **self._options(rule),
        )
        self._note_copies()

    def _options(self, rule: AttentionRule) -> dict[str, Any]:
        return {
            "window_left": rule.window - 1,  # -1 is every key, as a window of 0 is ours
            "logits_soft_cap": rule.softcap,
            "sm_scale": rule.scale,
            "q_data_type": self._dtype,
            "kv_data_type": self._dtype,
        }

    def _note_copies(self) -> None:
        if self._copies is not None:
            self._copies.record()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _uses_tensor_cores(rule: AttentionRule) -> bool:
    # The other decode kernel exists for a few group sizes only and is faster for the smallest.
    return rule.shape.num_heads // rule.shape.num_kv_heads > 2


def _pages(host: HostIndex, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (indptr [n + 1], indices [pages], last_page_len [n]) as FlashInfer counts pages."""
    num_pages = -(-host.key_counts // block_size)
    used = np.arange(host.blocks.shape[1]) < num_pages[:, None]
    last = host.key_counts - (num_pages - 1) * block_size
    return _indptr(num_pages), torch.from_numpy(host.blocks[used]), torch.from_numpy(last)


def _indptr(counts: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
