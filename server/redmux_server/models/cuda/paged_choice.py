"""Choose the attention library for a device: the first that is there and computes rightly."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from redmux_server.models.cuda.paged_cache import PagedAttention, PagedKVCache
from redmux_server.models.cuda.paged_torch import TorchAttention
from redmux_server.models.kvcache import LayerShape, Segment

Candidate = tuple[str, Callable[[], PagedAttention]]

# Of outputs around 1, between two libraries.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_WINDOW = 20


def candidates(device: torch.device, dtype: torch.dtype) -> list[Candidate]:
    """Returns the libraries to try on this device, best first."""
    if device.type != "cuda":
        return []
    return [("Triton", lambda: _triton_attention(device))]


def _triton_attention(device: torch.device) -> PagedAttention:
    from redmux_server.models.cuda.paged_triton import TritonAttention

    return TritonAttention(torch.cuda.get_device_properties(device).multi_processor_count)


def choose_attention(
    tried: Sequence[Candidate],
    shapes: Sequence[LayerShape],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[PagedAttention, str]:
    """Returns the first of `tried` that equals TorchAttention here, else that; and the reason."""
    refused: list[str] = []
    for name, make in tried:
        try:
            attention = make()
            error = max(_difference(attention, s, device, dtype) for s in set(shapes))
        except ImportError:
            refused.append(f"{name} is not installed")
            continue
        except Exception as err:  # whatever a library does here, there is another one
            refused.append(f"{name} failed: {type(err).__name__}: {err}".splitlines()[0][:200])
            continue
        if error < _TOLERANCE[dtype]:  # false for NaN
            return attention, _reason(name, refused)
        refused.append(f"{name} differs from plain attention by {error:.1e}")
    return TorchAttention(), _reason("torch over gathered pages", refused)


def _reason(name: str, refused: Sequence[str]) -> str:
    return f"attention: {name}" + (f" ({'; '.join(refused)})" if refused else "")


@torch.inference_mode()
def _difference(
    attention: PagedAttention, shape: LayerShape, device: torch.device, dtype: torch.dtype
) -> float:
    """Returns the largest difference to TorchAttention over prefills, mixed steps and decodes.

    Pages hold NaN where nothing was written, as those of a broken request may. NaN if it leaks.
    """
    generator = torch.Generator().manual_seed(0)
    steps = (  # (request, position, count) of each segment
        ((0, 0, 40), (1, 0, 5)),
        ((1, 5, 1), (0, 40, 30), (2, 0, 300)),
        ((0, 70, 1), (1, 6, 1), (2, 300, 1)),
    )
    caches = []
    for library in (attention, TorchAttention()):
        width = -(-301 // library.block_size)
        cache = PagedKVCache([shape], 3 * width, library, device, dtype)
        cache.poison(range(3 * width), float("nan"))
        caches.append((cache, [list(range(i, 3 * width, 3)) for i in range(3)]))
    worst = 0.0
    for window in (0, _WINDOW):
        for parts in steps:
            total = sum(count for _, _, count in parts)
            qkv = [
                torch.randn(1, heads, total, shape.head_dim, generator=generator).to(device, dtype)
                for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
            ]
            got, want = (_run(cache, blocks, parts, qkv, window) for cache, blocks in caches)
            difference = float((got.float() - want.float()).abs().max())
            if not difference <= _TOLERANCE[dtype]:
                return difference
            worst = max(worst, difference)
    return worst


def _run(
    cache: PagedKVCache,
    blocks: Sequence[Sequence[int]],
    parts: Sequence[tuple[int, int, int]],
    qkv: Sequence[Tensor],
    window: int,
) -> Tensor:
    segments: list[Segment] = []
    for request, position, count in parts:
        start = segments[-1].start + segments[-1].count if segments else 0
        segments.append(Segment(start, count, position, blocks[request]))
    with cache.step(segments):
        query, key, value = qkv
        return cache.layers[0](query, key, value, query.shape[3] ** -0.5, window, 0.0)
