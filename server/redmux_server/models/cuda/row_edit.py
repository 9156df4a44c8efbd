"""Edit each token by a row of the adapter bank's own table, and choose what computes it."""

import torch
from torch import Tensor

from redmux_server.engine.bank import SiteColumns
from redmux_server.models.editing import RowEdit


def torch_edit(h: Tensor, table: Tensor, rows: Tensor, columns: SiteColumns) -> None:
    """The edit in plain torch, for any device: gathers the vectors, then one addcmul."""
    scale = columns.scale_of(table).index_select(0, rows)
    bias = columns.bias_of(table).index_select(0, rows)
    torch.addcmul(bias, h, scale, out=h)


def choose_edit(device: torch.device, dtype: torch.dtype) -> tuple[RowEdit, str]:
    """Returns what edits rows on this device, and why; the kernel must first equal torch."""
    if device.type != "cuda":
        return torch_edit, "edits: torch (no CUDA device)"
    try:
        from redmux_server.models.cuda.triton_edit import triton_edit

        error = _difference(triton_edit, device, dtype)
    except Exception as err:  # a kernel that does not import or compile must not stop the server
        return torch_edit, f"edits: torch (the Triton kernel failed: {_first_line(err)})"
    if not error < 1e-2:
        return torch_edit, f"edits: torch (the Triton kernel differs by {error:.1e})"
    return triton_edit, "edits: one Triton kernel per site, checked at start"


def _difference(edit: RowEdit, device: torch.device, dtype: torch.dtype) -> float:
    """Returns the largest difference to torch over a small mixed step."""
    generator = torch.Generator().manual_seed(0)
    columns = SiteColumns(3, 1030)
    table = torch.randn(5, 2100, generator=generator).to(device, dtype)
    columns.scale_of(table)[0], columns.bias_of(table)[0] = 1, 0
    rows = torch.tensor([0, 4, 1, 1, 0, 3, 2], dtype=torch.int32, device=device)
    h = torch.randn(7, 1030, generator=generator).to(device, dtype)
    want = h.clone()
    edit(h, table, rows, columns)
    torch_edit(want, table, rows, columns)
    return float(((h - want).abs() / want.abs().clamp(min=1)).max())


def _first_line(err: Exception) -> str:
    return f"{type(err).__name__}: {err}".splitlines()[0][:200]
