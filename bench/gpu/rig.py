"""Random models of real shapes behind the parts that serve on a GPU, without server and hub."""

import dataclasses
from typing import Any

import torch

from redmux_adapters import Adapter, editable_sites, ffn_sites, fingerprint
from redmux_bench.adapters import random_adapter
from redmux_bench.steps import Stepper
from redmux_server.models.causal.attention import attach, discover
from redmux_server.models.causal.selfcheck import min_cache_tokens, reference
from redmux_server.models.cuda.runner import DeviceRunner
from redmux_server.models.cuda.runtime import DeviceRuntime

# The published configurations of Llama 3.2 1B and Llama 3.1 8B, and one for --cpu-smoke.
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def random_model(shape: str, device: torch.device, dtype: torch.dtype, layers: int = 0) -> Any:
    """Returns a frozen model of this shape with random weights, cut to `layers` unless 0."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    options = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**options, max_position_embeddings=4096, rms_norm_eps=1e-5,
                         bos_token_id=0, eos_token_id=0, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


class Engine(Stepper):
    """A model with its cache and bank behind the runner that serves it, stepped by hand."""

    def __init__(
        self, model: Any, *, max_running: int, max_context: int, uses_graphs: bool = True
    ) -> None:
        self.model = model
        self._fingerprint, self._ffn = fingerprint(model), ffn_sites(model)
        self._sites, expected = editable_sites(model), reference(model)
        shapes, rules = discover(model)
        runtime = DeviceRuntime.choose(shapes, model.device, model.dtype, num_threads=1)
        if not uses_graphs:
            runtime = dataclasses.replace(runtime, uses_graphs=False)
        elif not runtime.uses_graphs and model.device.type == "cuda":
            # Contexts are short and bounded here, so gathering the longest for all is bearable.
            runtime = dataclasses.replace(
                runtime, uses_graphs=True, reasons=(*runtime.reasons, "graphs: forced here"),
            )  # fmt: skip
        block = runtime.attention.block_size
        per_request = -(-max_context // block) * block
        tokens = max(max_running * per_request, min_cache_tokens(block))
        self._cache = runtime.make_cache(shapes, tokens)
        attach(model, self._cache)
        parts = runtime.assemble(
            model, rules, self._cache, self._sites, expected, max_running=max_running,
            max_context=max_context, bank_bytes=1 << 30,
        )  # fmt: skip
        self.reasons = parts.reasons
        super().__init__(parts.runner, parts.bank, self._cache.num_blocks, block)

    @property
    def ways(self) -> list[str]:
        """Names of the ways to compute decode steps; one only where nothing is captured."""
        graphs = self.runner._graphs
        ways = [way.name for way in self.runner._decoder.decode_ways()]
        return ways[:1] if graphs is None else [w for w in ways if w in (graphs.ways or ways)]

    def runner_by(self, way: str) -> DeviceRunner:
        """Returns a runner of the same parts whose decode steps are computed in this way alone."""
        own = self.runner
        graphs = own._graphs and dataclasses.replace(own._graphs, ways=frozenset({way}))
        runner = DeviceRunner(self.model, own._decoder, self._cache, self.bank, 1, graphs=graphs)
        runner.prepare()
        return runner

    def adapter(self, seed: int, all_sites: bool = False) -> Adapter:
        """Returns a random adapter of the FFN or of all sites."""
        return random_adapter(self._fingerprint, self._sites if all_sites else self._ffn, seed)
