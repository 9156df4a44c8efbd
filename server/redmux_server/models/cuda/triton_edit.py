"""The edit of a step as one Triton kernel. Imported only where Triton is wanted: see row_edit."""

import triton
import triton.language as tl
from torch import Tensor

from redmux_server.engine.bank import SiteColumns

_LARGEST_BLOCK = 1024  # columns of one program: enough loads in flight, few idle lanes


@triton.jit
def _edit_kernel(h, table, rows, start, dim, h_stride, table_stride, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + token).to(tl.int64)
    # Row 0 is the identity: not touching h keeps every bit of it, and reads nothing.
    if row != 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_inside = column < dim
        vectors = table + row * table_stride + start + column
        scale = tl.load(vectors, mask=is_inside, other=1.0).to(tl.float32)
        bias = tl.load(vectors + dim, mask=is_inside, other=0.0).to(tl.float32)
        values = h + token * h_stride + column
        edited = tl.load(values, mask=is_inside, other=0.0).to(tl.float32) * scale + bias
        tl.store(values, edited.to(h.dtype.element_ty), mask=is_inside)


def triton_edit(h: Tensor, table: Tensor, rows: Tensor, columns: SiteColumns) -> None:
    """See `row_edit.RowEdit`; the arithmetic is fp32 for every dtype of `h` and `table`."""
    assert h.stride(1) == table.stride(1) == 1, "columns must be contiguous"
    block = min(_LARGEST_BLOCK, triton.next_power_of_2(columns.dim))
    _edit_kernel[(h.shape[0], triton.cdiv(columns.dim, block))](
        h, table, rows, columns.start, columns.dim, h.stride(0), table.stride(0), BLOCK=block
    )
