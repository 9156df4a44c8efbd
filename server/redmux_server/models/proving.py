"""What the checks at start have in common: random adapters, and the measure of an error."""

from collections.abc import Mapping

import torch
from torch import Tensor

from redmux_adapters import Edit
from redmux_adapters.bases.sites import LAYER_NORM


def relative_error(got: Tensor, want: Tensor) -> float:
    """Returns the largest difference relative to the largest of `want`, NaN for NaN."""
    return float((got - want).abs().max() / want.abs().max())


def random_edits(sites: Mapping[str, int], seed: int) -> dict[str, Edit]:
    """Returns edits with a LayerNorm behind each for odd seeds, without any for even ones."""
    chosen = {s: dim for s, dim in sites.items() if seed % 2 or not s.endswith(LAYER_NORM)}
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, sum(chosen.values()), generator=generator)
    values = values * torch.tensor([[0.3], [0.1]]) + torch.tensor([[1.0], [0.0]])
    scales, biases = (row.split([*chosen.values()]) for row in values)
    return {s: Edit.adopt(*edit) for s, *edit in zip(chosen, scales, biases, strict=True)}
