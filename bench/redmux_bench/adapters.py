"""Random adapters for a load: of the size and magnitude of trained ones, each different."""

from collections.abc import Mapping

import torch

from redmux_adapters import Adapter, Edit, ffn_sites
from redmux_adapters.bases.load import resolve


def random_adapter(base_fingerprint: str, sites: Mapping[str, int], seed: int) -> Adapter:
    """Returns an adapter of every site: scales 1 + 0.1 * normal, biases 0.05 * normal."""
    generator = torch.Generator().manual_seed(seed)
    dims = list(sites.values())
    scales, biases = torch.randn(2, sum(dims), generator=generator)
    pairs = zip((1 + 0.1 * scales).split(dims), (0.05 * biases).split(dims), strict=True)
    edits = {site: Edit(*pair) for site, pair in zip(sites, pairs, strict=True)}
    return Adapter(base_fingerprint, edits)


def model_sites(model: str) -> dict[str, int]:
    """Returns {module path: output size} of RED's sites of a model, without loading its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(resolve(model), trust_remote_code=False)
    with torch.device("meta"):
        return ffn_sites(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
