"""Tells base models apart, whatever precision a copy of them is kept in."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .sketch import NUM_COORDINATES, QUANTIZED, Digests, Sketch

_TILE = 16  # rows and columns that are read at each place of a matrix
_NUM_TILES = 2  # of a matrix
_NUM_EMBEDDING_TILES = 8
_NUM_VALUES = _NUM_TILES * _TILE * _TILE

Floats = NDArray[np.float32]


def fingerprint(model: nn.Module) -> str:
    """Returns what tells a base model from others: a name to be compared by `match_bases`.

    `model` is what AutoModelForCausalLM or its siblings load, before its modules are replaced. The
    name is "<model_type>-<hidden size>x<layers>-<16 hexadecimal digits>-<token ids>-<sketch>". The
    digits are the start of a SHA-256 over the name and the values, cast to bf16, of every
    one-dimensional parameter, in the order of the names; norm weights and biases are never
    quantised. The `Sketch` is of the matrices, 512 values of each.

    Copies of one model in two precisions may have two names, which match all the same.
    """
    config: Any = model.config
    text_config = config.get_text_config()
    sample = _read(model)
    shape = f"{text_config.hidden_size}x{text_config.num_hidden_layers}"
    matrices = sample.embedding | sample.matrices
    sketch = Sketch(
        _digests(sample.embedding),
        _digests(sample.vectors | sample.matrices),
        _repeats(sample.embedding.values()) >= QUANTIZED,
        _repeats(_by_shape(matrices.values())),
        _projections(matrices),
    )
    vectors, count = _vectors_digest(sample.vectors), sample.num_token_ids
    return f"{config.model_type}-{shape}-{vectors}-{count}-{sketch.text()}"


class _Sample(NamedTuple):
    """What is read of a model, by the names of parameters."""

    num_token_ids: int
    vectors: dict[str, Floats]  # whole
    embedding: dict[str, Floats]  # the matrix with a row per token id
    matrices: dict[str, Floats]  # all others, in places: [_NUM_TILES, up to 16, up to 16]


def _read(model: Any) -> _Sample:
    table = model.get_input_embeddings().weight
    vectors, embedding, matrices = {}, {"": _tiles(table, _NUM_EMBEDDING_TILES)}, {}
    # An output head may be tied to the embedding in one copy and be stored twice in another.
    seen = {_tiles(table).tobytes()}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            vectors[name] = _numbers(parameter)
        elif parameter is not table and parameter.numel():
            tiles = _tiles(parameter)
            content = tiles.tobytes()
            if content not in seen:
                seen.add(content)
                matrices[name] = tiles
    return _Sample(table.shape[0], vectors, embedding, matrices)


def _tiles(parameter: Tensor, count: int = _NUM_TILES) -> Floats:
    """Returns squares of a matrix, evenly down its rows and, the other way, along its columns.

    They begin where the blocks of quantisations do, at multiples of 16.
    """
    matrix = parameter.detach().reshape(-1, parameter.shape[-1])
    places = []
    for index in range(1, count + 1):
        row = matrix.shape[0] * index // (count + 1) // _TILE * _TILE
        column = matrix.shape[1] * (count + 1 - index) // (count + 1) // _TILE * _TILE
        places.append(matrix[row : row + _TILE, column : column + _TILE])
    rows, columns = (min(place.shape[axis] for place in places) for axis in (0, 1))
    return _numbers(torch.stack([place[:rows, :columns] for place in places]))


def _numbers(values: Tensor) -> Floats:
    numbers: Floats = values.detach().to("cpu", torch.float32).numpy()
    return numbers


def _vectors_digest(vectors: Mapping[str, Floats]) -> str:
    digest = hashlib.sha256()
    for name, values in vectors.items():
        for content in (name.encode(), _as(torch.bfloat16, values)):
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
    return digest.hexdigest()[:16]


def _digests(arrays: Mapping[str, Floats]) -> Digests:
    names = "\n".join(arrays).encode()
    values = np.concatenate([np.zeros(0, np.float32), *(a.reshape(-1) for a in arrays.values())])
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    return Digests.of(*(hashlib.sha256(names + _as(kind, values)).digest() for kind in kinds))


def _as(kind: torch.dtype, values: Floats) -> bytes:
    """Returns the little-endian bytes of the values, rounded to `kind`."""
    rounded = torch.tensor(values).to(kind)
    if kind == torch.float32:
        return rounded.numpy().astype("<f4", copy=False).tobytes()
    return rounded.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()


def _by_shape(arrays: Iterable[Floats]) -> list[Floats]:
    """Returns the arrays, those of one shape stacked."""
    groups: dict[tuple[int, ...], list[Floats]] = {}
    for array in arrays:
        groups.setdefault(array.shape, []).append(array)
    return [np.stack(group) for group in groups.values()]


def _repeats(tiles: Iterable[Floats]) -> float:
    """Returns how often two of 16 neighbours are equal, along rows or columns of the matrices.

    Values of deviation d on a grid of steps s meet with a probability of s / (2 sqrt(pi) d), and
    rounding to it has changed them by s / sqrt(12): so this is, within 2 %, the relative error of
    the rounding that they have been through.
    """
    tiles = list(tiles)
    shares = [
        np.concatenate([np.zeros(0), *(_equal_pairs(np.moveaxis(t, axis, 0)) for t in tiles)])
        for axis in (-1, -2)
    ]
    return max(float(share.mean()) if len(share) else 0.0 for share in shares)


def _equal_pairs(groups: Floats) -> NDArray[np.float64]:
    """Returns the share of equal pairs in each group along axis 0 that is not constant."""
    size = len(groups)
    groups = np.ascontiguousarray(groups).reshape(size, -1)
    pairs = np.zeros(groups.shape[1])
    for step in range(1, size):
        pairs += (groups[step:] == groups[:-step]).sum(0)
    shares: NDArray[np.float64] = pairs / max(1, size * (size - 1) // 2)
    return shares[shares < 1]


def _projections(matrices: Mapping[str, Floats]) -> tuple[float, ...]:
    """Returns projections on random signs of what was read of the matrices, each of norm 1.

    Their root mean square difference between two models estimates how far the matrices are apart,
    relative to their size; it is about 1.4 for models that have nothing in common.
    """
    total = np.zeros(NUM_COORDINATES)
    for name, tiles in matrices.items():
        values = tiles.reshape(-1)[:_NUM_VALUES]
        norm = np.linalg.norm(values)
        if norm:
            signs = _signs(hashlib.sha256(name.encode()).digest(), NUM_COORDINATES)
            total += signs * (_PATTERN[:, : len(values)] @ (values / norm))
    return tuple((total / len(matrices) ** 0.5).tolist())


def _signs(content: bytes, count: int) -> Floats:
    """Returns -1 or 1 for each of the first bits of `content`."""
    bits = np.unpackbits(np.frombuffer(content, np.uint8), count=count)
    return 2 * bits.astype(np.float32) - 1


_PATTERN = _signs(
    hashlib.shake_128(b"redmux").digest(NUM_COORDINATES * _NUM_VALUES // 8),
    NUM_COORDINATES * _NUM_VALUES,
).reshape(NUM_COORDINATES, _NUM_VALUES)
