"""Swap modules of a loaded model for faster ones of the same mathematics."""

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
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, self.packed, self.bias, "none", [], ""
        )
        return y


def joined(*linears: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Returns weight [out, in] and bias that give the outputs of these linears side by side.

    Takes nn.Linear and Conv1D, which keeps its weight as [in, out].
    """
    weights, biases = [], []
    for linear in linears:
        tensors = {key: parameter.data for key, parameter in linear.named_parameters()}
        weights.append(
            tensors["weight"] if isinstance(linear, nn.Linear) else tensors["weight"].t()
        )
        biases.append(tensors.get("bias"))
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    zeros = (weight.new_zeros(len(weight)) for weight in weights)
    filled = [zero if bias is None else bias for zero, bias in zip(zeros, biases, strict=True)]
    return torch.cat(weights), torch.cat(filled)


def can_pack() -> bool:
    """Whether this build of torch has the oneDNN operators on this CPU."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_onednn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def pack_linears(model: nn.Module) -> int:
    """Replaces every nn.Linear and Conv1D by a PackedLinear, in place; returns how many.

    Module paths, and so sites and hooks, stay as they are. Original weights are released, except
    where an embedding shares them.
    """
    from transformers.pytorch_utils import Conv1D

    count = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) not in (nn.Linear, Conv1D):
                continue
            setattr(parent, name, PackedLinear(*joined(child)))
            count += 1
    unmap(model)
    return count


def unmap(model: nn.Module) -> None:
    """Copies what is left of a model, so that nothing holds on to the file it was mapped from."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
