"""The engine of a GPU on the CPU: torch's attention, and graphs that run their steps anew."""

import torch

from redmux_adapters import editable_sites, ffn_sites, load_base, with_layer_norms
from redmux_server.engine.bank import AdapterBank
from redmux_server.engine.blocks import BlockPool
from redmux_server.engine.request import Request, SamplingParams, Work
from redmux_server.models.causal.attention import attach, discover
from redmux_server.models.cuda.decoder import HookedDecoder
from redmux_server.models.cuda.paged_cache import PagedKVCache
from redmux_server.models.cuda.paged_torch import TorchAttention
from redmux_server.models.cuda.row_edit import torch_edit
from redmux_server.models.cuda.runner import DeviceRunner, Graphs

CPU = torch.device("cpu")


class FakeCapture:
    """What CudaCapture is to CUDA: warms up, keeps the launch, counts."""

    def __init__(self, log=None):
        self.log = [] if log is None else log  # "capture" and "replay", in order

    def __call__(self, launch):
        launch()
        launch()
        self.log.append("capture")

        def replay():
            self.log.append("replay")
            launch()

        return replay


def launches_anew():
    """A capture that does not even warm up, where launches take long."""
    return lambda launch: launch


class GraphableAttention(TorchAttention):
    can_graph = True


class Stepper:
    """Requests that hold blocks of `pool` and slots of `bank`, and steps of `runner` on them."""

    def request(self, prompt, adapter=None, max_tokens=20):
        request = Request(
            prompt_ids=list(prompt), max_tokens=max_tokens, sampling=SamplingParams(),
            stop_token_ids=frozenset(), tenant="", adapter=adapter, logprobs=False,
            sink=lambda event: None,
        )  # fmt: skip
        request.blocks = self.pool.allocate(request.max_length)
        if adapter is not None:
            request.slot = self.bank.acquire(adapter.digest, adapter.edits)
        return request

    def step(self, *parts):
        """Runs (request, count) parts as one step; returns its logits."""
        logits = self.runner.forward([Work(r, n) for r, n in parts])
        for request, count in parts:
            request.num_computed += count
        return logits

    def prefill(self, *requests):
        return self.step(*((r, len(r.prompt_ids)) for r in requests))

    def decode(self, *requests, token=None):
        """One step that gives every request the next token (or `token`) and computes it."""
        for i, request in enumerate(requests):
            request.token_ids.append((7 * i + 11) % 250 if token is None else token)
        return self.step(*((r, 1) for r in requests))


class DeviceRig(Stepper):
    """A model behind a DeviceRunner, and requests that hold blocks and slots."""

    def __init__(self, folder, *, graphs=True, max_running=6, max_context=96, num_blocks=40):
        self.model, _ = load_base(str(folder), torch.float32)
        sites = with_layer_norms(editable_sites(self.model))
        shapes, _ = discover(self.model)
        self.cache = PagedKVCache(shapes, num_blocks, GraphableAttention(), CPU, torch.float32)
        attach(self.model, self.cache)
        self.bank = AdapterBank(
            sites, device=CPU, dtype=torch.float32, max_bytes=0, min_slots=max_running + 1,
            preallocated=True,
        )  # fmt: skip
        self.bank.reserve(ffn_sites(self.model))
        self.log = []
        self.pool = BlockPool(num_blocks, self.cache.block_size)
        width = -(-max_context // self.cache.block_size)
        decoder = HookedDecoder(self.model, self.cache, torch_edit)
        self.runner = DeviceRunner(
            self.model, decoder, self.cache, self.bank, 2,
            graphs=Graphs(self.new_capture, max_running, width) if graphs else None,
        )  # fmt: skip

    def new_capture(self):
        return FakeCapture(self.log)
