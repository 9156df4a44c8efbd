"""Swap modules of a loaded model for faster ones of the same mathematics."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A frozen fp32 linear layer on the CPU, its weight reordered once for oneDNN.

    Two to three times the speed of F.linear for a few dozen rows, and row-invariant: a row's
    result has the same bits whatever the number of rows, which MKL's products have not. Where
    oneDNN sums a single row in another order (it splits a long one over threads on some CPUs),
    a single row is computed as one of two.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` is [out_features, in_features]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self.bias = bias
        probe = torch.randn(2, self.in_features, generator=torch.Generator().manual_seed(0))
        self._pairs_single_rows = not torch.equal(
            self._product(probe)[:1], self._product(probe[:1])
        )

    def forward(self, x: Tensor) -> Tensor:
        """Takes [..., in_features], returns [..., out_features]."""
        if self._pairs_single_rows and x.numel() == self.in_features:
            pair = x.reshape(1, -1).expand(2, -1).contiguous()
            return self._product(pair)[:1].view(*x.shape[:-1], self.out_features)
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def can_pack() -> bool:
    """Whether this build of torch has the oneDNN operators on this CPU."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_onednn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def pack_linears(
    model: nn.Module, make_linear: Callable[[Tensor, Tensor | None], nn.Module] = PackedLinear
) -> int:
    """Replaces every nn.Linear and Conv1D by what `make_linear` makes of its weight and bias.

    Works in place and returns how many. Module paths, and so sites and hooks, stay as they are.
    Original weights are released, except where an embedding shares them; what is left is copied,
    so that nothing holds on to the file that all of it was mapped from.
    """
    from transformers.pytorch_utils import Conv1D

    count = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) not in (nn.Linear, Conv1D):
                continue
            tensors = {key: parameter.data for key, parameter in child.named_parameters()}
            # Conv1D keeps its weight as [in_features, out_features].
            weight = tensors["weight"].t() if type(child) is Conv1D else tensors["weight"]
            setattr(parent, name, make_linear(weight, tensors.get("bias")))
            count += 1
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return count
