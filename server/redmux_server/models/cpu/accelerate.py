"""Swap the linear modules of a loaded model for faster ones of the same mathematics."""

import torch
from torch import Tensor, nn

from redmux_server.models.cpu.packed_linear import packed_linear


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


def pack_linears(model: nn.Module, precision: str = "fp32") -> int:
    """Replaces every nn.Linear and Conv1D by a PackedLinear of this precision.

    Works in place and returns how many. Module paths, and so sites and hooks, stay as they are.
    Original weights are released, except where an embedding shares them.
    """
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    count = 0
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) not in (nn.Linear, Conv1D):
                continue
            setattr(parent, name, packed_linear(*joined(child), precision, child is head))
            count += 1
    unmap(model)
    return count


def computes_in_torch(model: nn.Module) -> bool:
    """Whether some matrix product of the model is torch's, and so needs torch's threads.

    Where none is, torch should have one thread. It cuts an activation into as many pieces as it
    has threads and computes the last elements of a piece in another way than the others, so with
    several threads a row's bits depend on the number of rows.
    """
    return any(
        parameter.dim() > 1
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    )


def unmap(model: nn.Module) -> None:
    """Lets go of the file that a model was mapped from, copying what is left of it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
