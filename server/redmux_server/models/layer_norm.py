"""The LayerNorm behind an edit, the variant "ln" of the RED authors' code."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # that of torch.nn.LayerNorm unless told otherwise, and so of the authors' code


def normalise(h: Tensor, weight: Tensor, bias: Tensor, is_on: Tensor) -> None:
    """Makes h[t] = LayerNorm(h[t]) * weight[t] + bias[t] in place where is_on[t] is not 0.

    h is [tokens, dim], weight and bias the same or one row for all, is_on [tokens] or [1]. The
    arithmetic is fp32 for every dtype. Other rows keep every bit.
    """
    normed = F.layer_norm(h.float(), h.shape[-1:], eps=EPS)
    normed = torch.addcmul(bias.float(), normed, weight.float()).to(h.dtype)
    h.copy_(torch.where(is_on[:, None] != 0, normed, h))
