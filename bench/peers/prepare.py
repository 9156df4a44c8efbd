"""Makes the files that the peers load: the model in each format, and random adapters.

All come from one source, the packaged SmolLM2, so that every engine multiplies with the same fp32
values (the f16 file rounds them). Written under OUT:

    hf/                     folder in transformers' layout, fp32 (vLLM, PEFT)
    smollm2-f32.gguf        the packaged file with every tensor dequantised (llama.cpp, OpenVINO)
    smollm2-f16.gguf        the same with its matrices rounded to f16
    lora/000/ ...           LoRA of rank 8 on q_proj and v_proj in PEFT's layout (vLLM, PEFT)
    lora-gguf/000.gguf ...  the same values for llama.cpp
    red/000.safetensors ... RED vectors at every FFN output (redmux)
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from redmux_adapters import to_bytes
from redmux_adapters.bases.fingerprint import fingerprint
from redmux_adapters.bases.load import _packaged_gguf, load_base
from redmux_adapters.bases.sites import ffn_sites
from redmux_bench.adapters import random_adapter

RANK, ALPHA = 8, 16


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--adapters", type=int, default=32)
    args = parser.parse_args(argv)
    for folder in ("red", "lora-gguf"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_base("smollm2")
    model.save_pretrained(args.out / "hf")
    tokenizer.save_pretrained(args.out / "hf")
    source = gguf.GGUFReader(_packaged_gguf())
    write_model(source, args.out / "smollm2-f32.gguf", np.float32, gguf.LlamaFileType.ALL_F32)
    write_model(source, args.out / "smollm2-f16.gguf", np.float16, gguf.LlamaFileType.MOSTLY_F16)
    sites, base = ffn_sites(model), fingerprint(model)
    for i in range(args.adapters):
        red = to_bytes(random_adapter(base, sites, seed=i))
        (args.out / "red" / f"{i:03}.safetensors").write_bytes(red)
        layers = list(random_lora(model.config, seed=i))
        write_peft(args.out / "lora" / f"{i:03}", layers)
        write_lora_gguf(args.out / "lora-gguf" / f"{i:03}.gguf", layers, model.config)


def write_model(source: Any, path: Path, dtype: type, file_type: gguf.LlamaFileType) -> None:
    """Copies a GGUF file with its matrices in `dtype`; vectors (norms) stay fp32 as usual."""
    writer = gguf.GGUFWriter(path, "llama")
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name in (
            "general.architecture", "general.file_type", "general.quantization_version"
        ):  # fmt: skip
            continue
        of = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], of)
    writer.add_file_type(file_type)
    for tensor in source.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float32 if values.ndim == 1 else dtype))
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


Lora = tuple[int, str, torch.Tensor, torch.Tensor]
"""Layer, "q" or "v", A [rank, in], B [out, rank]."""


def random_lora(config: Any, seed: int) -> Iterator[Lora]:
    generator = torch.Generator().manual_seed(seed)
    head_dim = config.hidden_size // config.num_attention_heads
    widths = {"q": config.hidden_size, "v": config.num_key_value_heads * head_dim}
    for layer in range(config.num_hidden_layers):
        for name, width in widths.items():
            yield (
                layer,
                name,
                0.04 * torch.randn(RANK, config.hidden_size, generator=generator),
                0.06 * torch.randn(width, RANK, generator=generator),
            )


def write_peft(folder: Path, layers: Sequence[Lora]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer, name, a, b in layers:
        module = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj"
        tensors[f"{module}.lora_A.weight"] = a
        tensors[f"{module}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
        "target_modules": ["q_proj", "v_proj"], "bias": "none", "lora_dropout": 0.0,
        "inference_mode": True, "base_model_name_or_path": "smollm2",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def write_lora_gguf(path: Path, layers: Sequence[Lora], config: Any) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, ALPHA)
    for layer, name, a, b in layers:
        if name == "q":
            b = interleave_halves(b, config.num_attention_heads)
        writer.add_tensor(f"blk.{layer}.attn_{name}.weight.lora_a", a.numpy())
        writer.add_tensor(f"blk.{layer}.attn_{name}.weight.lora_b", b.contiguous().numpy())
    finish(writer)


def interleave_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Puts the rows [out, rank] into GGUF's order for Llama: the two rotary halves interleaved."""
    out, rank = rows.shape
    return rows.reshape(heads, 2, out // heads // 2, rank).swapaxes(1, 2).reshape(out, rank)


if __name__ == "__main__":
    main()
