"""What must be right before a time means anything; every check raises or returns its figures."""

import math
from typing import Any

import torch
from rig import Engine, random_model
from torch import Tensor

from redmux_adapters import Adapter
from redmux_bench.plain_model import edited
from redmux_server.engine.bank import SiteColumns
from redmux_server.engine.request import Request
from redmux_server.models.cuda.paged_cache import PagedAttention, PagedKVCache
from redmux_server.models.cuda.paged_choice import candidates
from redmux_server.models.cuda.paged_torch import TorchAttention
from redmux_server.models.cuda.row_edit import torch_edit
from redmux_server.models.cuda.runner import DeviceRunner
from redmux_server.models.kvcache import LayerShape, Segment

Row = dict[str, Any]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def edit_kernel(device: torch.device, smoke: bool) -> list[Row]:
    """The Triton kernel against scale * h + bias in fp32, and the identity's bits."""
    if smoke:
        edit = torch_edit
    else:
        from redmux_server.models.cuda.triton_edit import triton_edit as edit
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for dim in (64, 1000) if smoke else (1, 64, 1000, 2048, 4096, 14336):
            columns = SiteColumns(3, dim)
            table = torch.randn(9, columns.stop + 1, device=device).to(dtype)
            columns.scale_of(table)[0], columns.bias_of(table)[0] = 1, 0
            picked = torch.arange(70, device=device, dtype=torch.int32) % 9
            h = torch.randn(70, dim, device=device).to(dtype)
            before, vectors = h.clone(), table[picked.long()].float()
            want = before.float() * columns.scale_of(vectors) + columns.bias_of(vectors)
            edit(h, table, picked, columns)
            error = float(((h.float() - want).abs() / want.abs().clamp(min=1)).max())
            assert error < TOLERANCE[dtype], f"{dtype} of {dim} is off by {error:.1e}"
            assert torch.equal(h[picked == 0], before[picked == 0]), "the identity changed a bit"
            rows.append({"dtype": str(dtype)[6:], "dim": dim, "max error": f"{error:.1e}"})
    return rows


def attention_library(
    make: Any, shape: LayerShape, device: torch.device, dtype: torch.dtype
) -> list[Row]:
    """One library against the formula in fp32, over pages that hold NaN where nothing was written.

    Prefills, chunks, mixed steps and decodes; full, with a window, with a soft cap.
    """
    attention: PagedAttention = make()
    rows = []
    for window, softcap in ((0, 0.0), (37, 0.0), (0, 20.0)):
        error = max(_ragged(attention, shape, device, dtype, window, softcap))
        assert error < TOLERANCE[dtype], f"window {window}, soft cap {softcap}: {error:.1e}"
        rows.append({"window": window, "soft cap": softcap, "max error": f"{error:.1e}"})
    return rows


def libraries(device: torch.device, dtype: torch.dtype) -> list[tuple[str, Any]]:
    """Returns the attention libraries to check on this device."""
    return [*candidates(device, dtype), ("torch over gathered pages", TorchAttention)]


def _ragged(
    attention: PagedAttention, shape: LayerShape, device: torch.device, dtype: torch.dtype,
    window: int, softcap: float,
) -> list[float]:  # fmt: skip
    lengths, width = (331, 64, 7), -(-331 // attention.block_size)
    cache = PagedKVCache([shape], 3 * width, attention, device, dtype)
    cache.poison(range(3 * width + 1), float("nan"))
    qkv = [
        [torch.randn(heads, n, shape.head_dim, device=device).to(dtype) for n in lengths]
        for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    ]
    scale, errors = shape.head_dim**-0.5, []
    cuts = (((0, 0, 200), (1, 0, 63)), ((1, 63, 64), (0, 200, 330), (2, 0, 6)),
            ((0, 330, 331), (2, 6, 7)))  # fmt: skip
    for parts in cuts:
        segments: list[Segment] = []
        for i, start, stop in parts:
            row = segments[-1].start + segments[-1].count if segments else 0
            segments.append(Segment(row, stop - start, start, list(range(i, 3 * width, 3))))
        q, k, v = (torch.cat([x[i][:, a:b] for i, a, b in parts], 1)[None] for x in qkv)
        with cache.step(segments):
            out = cache.layers[0](q, k, v, scale, window, softcap)[0]
        for s, (i, a, b) in zip(segments, parts, strict=True):
            want = _naive(*(x[i].float() for x in qkv), scale, window, softcap)[a:b]
            errors.append(float((out[s.start : s.start + s.count].float() - want).abs().max()))
    return [math.inf if math.isnan(e) else e for e in errors]


def _naive(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """Causal attention of one sequence [heads, tokens, dim] in fp32; [tokens, heads, dim]."""
    group = q.shape[0] // k.shape[0]
    scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(q.shape[1], device=q.device)
    distance = distance[:, None] - distance
    hidden = (distance < 0) | ((distance >= window) if window else False)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return (weights @ v.repeat_interleave(group, 0)).transpose(0, 1)


def graphed_decode(shape: str, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Decode steps replayed from graphs, in every way, against the same steps launched eagerly."""
    counts = (1, 3, 8) if dtype == torch.float32 else (1, 3, 8, 20)
    rows: list[Row] = []
    logits: list[tuple[str, list[Tensor]]] = []
    for uses_graphs in (True, False):
        model = random_model(shape, device, dtype, layers=2)
        engine = Engine(model, max_running=max(counts), max_context=128, uses_graphs=uses_graphs)
        ways = engine.ways if uses_graphs else ["launched eagerly"]
        for way in ways:
            runner = engine.runner_by(way) if uses_graphs else None
            logits.append((way, [_decode(engine, n, runner) for n in counts]))
        if uses_graphs:
            reasons = engine.reasons
    *graphed, (_, eager) = logits
    for way, own in graphed:
        for n, got, want in zip(counts, own, eager, strict=True):
            error = float((got - want).abs().max() / want.abs().max())
            assert error < TOLERANCE[dtype], f"{way}, {n} requests: {error:.1e}"
            rows.append({"way": way, "requests": n, "relative error": f"{error:.1e}",
                         "bit-equal": torch.equal(got, want)})  # fmt: skip
    rows += [{"what ran": reason} for reason in reasons]
    return rows


def _decode(engine: Engine, n: int, runner: DeviceRunner | None) -> Tensor:
    requests = [
        engine.request([3 + i] * (5 + 9 * i), 8, engine.adapter(i) if i % 3 else None)
        for i in range(n)
    ]
    engine.step([(r, len(r.prompt_ids)) for r in requests])
    out = []
    for token in (5, 6, 7):
        for request in requests:
            request.token_ids.append(token)
        out.append(engine.step([(r, 1) for r in requests], runner).float())
    engine.release(requests)
    return torch.stack(out)


def tokens(shape: str, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """The engine's greedy tokens, in every way, against plain transformers edited by hand.

    In half precision a tie may fall either way: then the plain logits of the two tokens must be
    within rounding.
    """
    plain = random_model(shape, device, dtype, layers=4)
    engine = Engine(random_model(shape, device, dtype, layers=4), max_running=8, max_context=128)
    adapters = [None, *(engine.adapter(seed, all_sites=seed > 2) for seed in range(1, 5))]
    rows = []
    for way in engine.ways:
        runner = engine.runner_by(way)
        requests = [
            engine.request(range(10 + i, 30 + 5 * i), 16, a) for i, a in enumerate(adapters)
        ]
        logits = engine.step([(r, len(r.prompt_ids)) for r in requests], runner)
        for _ in range(15):
            for request, row in zip(requests, logits, strict=True):
                request.token_ids.append(int(row.argmax()))
            logits = engine.step([(r, 1) for r in requests], runner)
        for i, (request, row) in enumerate(zip(requests, logits, strict=True)):
            compared = _compare_tokens(plain, request, row, TOLERANCE[dtype])
            rows.append({"way": way, "adapter": i or "none", **compared})
        engine.release(requests)
    rows += [{"what ran": reason} for reason in engine.reasons]
    return rows


def _compare_tokens(plain: Any, request: Request, logits: Tensor, tolerance: float) -> Row:
    """Compares a request's tokens and its last logits with the plain model's."""
    wanted = _plain_logits(plain, request.token_ids, request.adapter)
    first, out = len(request.prompt_ids), request.token_ids
    steps = wanted[first - 1 : len(out) - 1]  # [15, vocab]
    chosen = steps.gather(1, torch.tensor(out[first:], device=steps.device)[:, None])[:, 0]
    gap = float(((steps.max(-1).values - chosen) / steps.abs().max()).max())
    best = steps.argmax(-1).tolist()
    equal = sum(a == b for a, b in zip(best, out[first:], strict=True))
    assert gap < tolerance, f"a token was chosen that is {gap:.1e} worse"
    error = float((logits.float() - wanted[-1]).abs().max() / wanted[-1].abs().max())
    assert error < tolerance, f"logits are off by {error:.1e}"
    return {"equal tokens": f"{equal} of {len(steps)}", "largest gap": f"{gap:.1e}",
            "logit error": f"{error:.1e}"}  # fmt: skip


@torch.inference_mode()
def _plain_logits(model: Any, ids: list[int], adapter: Adapter | None) -> Tensor:
    batch = torch.tensor([ids], device=model.device)
    with edited(model, {} if adapter is None else adapter.edits):
        logits: Tensor = model(input_ids=batch, use_cache=False).logits[0].float()
    return logits
