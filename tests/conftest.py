"""Tiny models, tiny adapters and real servers for the whole suite."""

import dataclasses
import logging
import os
from pathlib import Path

import pytest
import torch

from redmux import AsyncClient
from redmux_adapters import Adapter, Edit, fingerprint, load_base, to_bytes

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run in two processes: threads that wait for each other busily would hold up the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Triton's kernels run in its interpreter, which it decides on when it is imported.
os.environ["TRITON_INTERPRET"] = "1"
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"


@pytest.fixture(autouse=True)
def log_level():
    """A command that runs in this process sets how much all of it logs."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


def save_tiny_model(folder: Path, config, seed: int = 0, gain: float = 4, kind=None) -> Path:
    """A random model of a real architecture with a byte-level tokenizer, as a model folder.

    Weights are `gain` times what the architecture starts training with: logits of small models
    are then far from uniform. `kind` is the auto class that makes it, AutoModelForCausalLM if
    left out.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0} | {char: i + 1 for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)

    torch.manual_seed(seed)
    model = (kind or AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of their own, so that the fingerprint is, too
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(gain)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        tie_word_embeddings=True, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), config)


@dataclasses.dataclass
class Base:
    """The plain model, for reference, and what adapters for it need."""

    folder: Path
    model: object
    tokenizer: object
    fingerprint: str
    ffn: dict[str, int]

    def adapter(self, seed: int, size: float = 1.0, **kwargs) -> Adapter:
        """A random adapter of the magnitude of trained ones."""
        generator = torch.Generator().manual_seed(seed)
        edits = {
            site: Edit(
                1 + 0.4 * size * torch.randn(dim, generator=generator),
                0.3 * size * torch.randn(dim, generator=generator),
            )
            for site, dim in self.ffn.items()
        }
        return Adapter(base_fingerprint=self.fingerprint, edits=edits, **kwargs)


def load_reference(folder: Path | str) -> Base:
    from redmux_adapters import ffn_sites

    model, tokenizer = load_base(str(folder))
    return Base(Path(folder), model, tokenizer, fingerprint(model), ffn_sites(model))


@pytest.fixture(scope="session")
def base(tiny_folder) -> Base:
    return load_reference(tiny_folder)


@pytest.fixture
async def start_server(tiny_folder):
    """Starts servers on free ports, inside the test's event loop; stops them at its end."""
    from redmux_server.app import Server
    from redmux_server.config import ServerConfig

    servers = []

    async def start(**options) -> Server:
        values = {
            "model": str(tiny_folder),
            "port": 0,
            "http_port": 0,
            "metrics_port": 0,
            "threads": 2,
        }
        server = await Server.start(ServerConfig(**values | options))
        servers.append(server)
        return server

    yield start
    for server in servers:
        await server.stop(drain_s=0)


@pytest.fixture
async def server(start_server):
    return await start_server(max_running=16, max_batch_tokens=48, max_queue=64)


@pytest.fixture
async def client(server):
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        yield client


@pytest.fixture
def put(client):
    """Publishes an adapter object under a name."""

    async def put(name, adapter, **options):
        return await client.adapters.put(name, to_bytes(adapter), **options)

    return put


@pytest.fixture(scope="session")
def postgresql():
    """A real PostgreSQL server."""
    import postgres

    if reason := postgres.missing():
        pytest.skip(reason)
    server = postgres.PostgreSQL()
    yield server
    server.close()
