"""How often base fingerprints refuse a copy of the same model, and take a relative of it.

    python bench/fingerprint_rates.py smollm2 FOLDER ...

Every model counts twice: as it is, and with random values added that are an eighth as large as its
own, so that it has left the grid of a file that was quantised. Of both, copies are made in other
precisions and quantisations (those that the gguf package can write), and relatives: LoRAs merged
into some matrices, noise on all, other norms, added tokens; those in fp32, bf16 and Q8_0 as well.
"""

import argparse
import collections
import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gguf
import torch
from torch import Tensor

from redmux_adapters import fingerprint, match_bases
from redmux_adapters.bases.load_any import load_any

QUANTIZATIONS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
LORA_SIZES = (0.001, 0.003, 0.01, 0.03, 0.1)
_Q_AND_V = ("q_proj", "v_proj", "query", "value")
LORAS = {
    "q and v": _Q_AND_V,
    "q, v, gate, down": (*_Q_AND_V, "gate_proj", "down_proj", "intermediate", "output"),
}
REFUSED = ("other", "foreign")

Change = Callable[[Tensor], Tensor]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints what became of every pair."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="as of redmux serve --model")
    specs = parser.parse_args(argv).models
    same: collections.Counter[tuple[str, str]] = collections.Counter()
    relatives: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for spec in specs:
        loaded = load_any(spec)
        for model in (loaded, changed(loaded, smooth)):
            names = {kind: fingerprint(made) for kind, made in copies(model)}
            for (first, a), (second, b) in itertools.combinations(names.items(), 2):
                is_quantized = {first, second} & {*QUANTIZATIONS}
                kinds = "one or two quantised" if is_quantized else "none quantised"
                same[kinds, match_bases(a, b)] += 1
            for what, relative in made_relatives(model):
                for form in ("fp32", "bf16", "Q8_0"):
                    name = fingerprint(dict(copies(relative, (form,)))[form])
                    for kind, own in names.items():
                        relatives[what, f"{form} on {kind}", match_bases(own, name)] += 1
            print(f"{spec} done", file=sys.stderr, flush=True)
    for (kinds, match), count in sorted(same.items()):
        print(f"copies of one model, {kinds}: {match} {count}")
    table: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
    for (what, pair, match), count in relatives.items():
        form, kind = pair.split(" on ")
        coarse = next((k for k in QUANTIZATIONS[::-1] if k in (form, kind)), "none quantised")
        table[what, coarse][0] += count * (match not in REFUSED)
        table[what, coarse][1] += count
    for (what, coarse), (taken, total) in sorted(table.items()):
        print(f"{what:28} {coarse:16} taken {taken:4} of {total}")


def copies(model: Any, kinds: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yields the model in each precision and quantisation."""
    for kind in kinds or ("fp32", "bf16", "fp16", *QUANTIZATIONS):
        if kind in QUANTIZATIONS:
            yield kind, changed(model, quantize(kind))
        else:
            types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
            yield kind, copy.deepcopy(model).to(types[kind])


def made_relatives(model: Any) -> Iterator[tuple[str, Any]]:
    """Yields other models that were made of this one, with what was done."""
    for name, parts in LORAS.items():
        for size in LORA_SIZES:
            yield f"LoRA {size:g} in {name}", changed(model, merged(size), parts)
    for size in LORA_SIZES[:4]:
        yield f"noise {size:g} on matrices", changed(model, noisy(size))
    yield "norms times 1.001", changed(model, lambda w: w * 1.001 if w.dim() == 1 else w)
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(model.get_input_embeddings().num_embeddings + 2)
    yield "two added tokens", larger


def changed(model: Any, change: Change, parts: tuple[str, ...] = ("",)) -> Any:
    """Returns a copy with `change` applied to the parameters with one of `parts` in their names."""
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.copy_(change(parameter))
    return model


def smooth(weight: Tensor) -> Tensor:
    """Returns the matrix with noise, in the precision that checkpoints have."""
    return noisy(0.125)(weight).bfloat16().float()


def noisy(size: float) -> Change:
    """Returns what adds noise, relative to the weights, to a matrix."""
    return lambda w: w if w.dim() < 2 else w + size * w.std() * torch.randn_like(w)


def merged(size: float) -> Change:
    """Returns what adds a product of rank 8, relative to the weights, to a matrix."""

    def change(weight: Tensor) -> Tensor:
        if weight.dim() < 2:
            return weight
        product = torch.randn(weight.shape[0], 8) @ torch.randn(8, weight.shape[1])
        return weight + size * product * weight.norm() / product.norm()

    return change


def quantize(kind: str) -> Change:
    """Returns what leaves of a matrix what a GGUF file of this kind keeps."""
    target = gguf.GGMLQuantizationType[kind]

    def change(weight: Tensor) -> Tensor:
        if weight.dim() < 2 or weight.shape[-1] % 32:
            return weight
        blocks = gguf.quants.quantize(weight.numpy(), target)
        return torch.tensor(gguf.quants.dequantize(blocks, target))

    return change


if __name__ == "__main__":
    main()
