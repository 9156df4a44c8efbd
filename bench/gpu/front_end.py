"""The server on the device: the engine alone against the load through gRPC and HTTP."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rig import SHAPES, random_model

from redmux_bench.checkout import SOURCES


def measure(
    shape: str, device: torch.device, dtype: torch.dtype, *, smoke: bool
) -> list[dict[str, Any]]:
    """Runs `redmux bench engine` on a random model of this shape; needs the extra `bench`."""
    import grpc_health  # noqa: F401
    import psutil  # noqa: F401
    import tqdm  # noqa: F401

    streams, tokens, rounds = (4, 8, 1) if smoke else (64, 128, 3)
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name) / shape, Path(name) / "out.json"
        random_model(shape, torch.device("cpu"), dtype).save_pretrained(folder)
        _save_tokenizer(folder, SHAPES[shape]["vocab_size"])
        serve = ("--device", device.type, "--dtype", str(dtype).removeprefix("torch."),
                 "--max-context", "1024", "--kv-cache-tokens", "65536")  # fmt: skip
        command = [
            sys.executable, "-m", "redmux", "bench", "engine", "--model", str(folder),
            "--concurrency", str(streams), "--output-tokens", str(tokens),
            "--rounds", str(rounds), "--json", str(out),
            *(f"--serve-arg={argument}" for argument in serve),
        ]  # fmt: skip
        path = os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])
        ended = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
        )
        if ended.returncode:
            raise RuntimeError(f"redmux bench engine: {ended.stderr.strip()[-2000:]}")
        rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
        return rows


def _save_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes one that knows every id, as the load sends ids and never reads the text."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"w{i} ": i for i in range(vocab_size)}, unk_token="w0 ")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), eos_token="w0 ", pad_token="w0 "
    )
    tokenizer.save_pretrained(folder)
