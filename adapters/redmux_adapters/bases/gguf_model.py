"""GGUF files as folders that transformers loads: dequantised once, with the model's tokenizer."""

import gc
import logging
import shutil
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from redmux.errors import FailedPreconditionError, InvalidArgumentError

from .cache import (
    cache_folder,
    digest_of_content,
    digest_of_files,
    mark_used,
    remove,
    remove_unused,
)

logger = logging.getLogger(__name__)

_SOURCE = "source.txt"  # names the file that a folder was made of


def gguf_folder(path: Path, needs_tokenizer: bool = False) -> Path:
    """Returns the folder that holds a GGUF file dequantised to fp32, converting it on first use.

    Folders are in the cache folder. Their names tell the content of the file and the version of
    the conversion, so neither an overwritten file nor a mended conversion meets an old folder. The
    tokenizer is there if the file tells how its model cuts text; with `needs_tokenizer`, a file
    that does not is refused with InvalidArgumentError before its weights are converted.
    """
    content = digest_of_content(path)[:16]
    folder = cache_folder() / "gguf" / f"{path.stem}-{content}-{_conversion()}"
    if not folder.is_dir():
        _convert(path, folder, needs_tokenizer)
        gc.collect()  # the converted model is part of cycles: half a GB would stay for a while
        mark_used(folder)
        _remove_older(path, folder, content)
    elif needs_tokenizer and not (folder / "tokenizer.json").is_file():
        _tokenizer(path)  # raises what is wrong with it
    else:
        mark_used(folder)
    return folder


@cache
def _conversion() -> str:
    """Returns what tells versions of the conversion apart."""
    sources = [Path(__file__), Path(__file__).with_name("gguf_tokenizer.py")]
    return digest_of_files(sources, version("transformers"))[:8]


def _tokenizer(path: Path) -> Any:
    from .gguf_tokenizer import build_tokenizer

    return build_tokenizer(path)


def _convert(path: Path, folder: Path, needs_tokenizer: bool) -> None:
    from transformers import AutoModelForCausalLM

    logger.info("converting %s for first use, this takes a moment", path.name)
    try:
        tokenizer = _tokenizer(path)
    except InvalidArgumentError:
        if needs_tokenizer:
            raise
        tokenizer = None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        )
    except (KeyError, OSError, ValueError) as err:
        raise InvalidArgumentError(f"cannot read the model in {path}: {err}") from err
    # The weights are plain fp32 from here on; transformers refuses to save them as GGUF.
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Built beside its final place and renamed, so that a folder that exists is complete.
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            (partial / _SOURCE).write_text(str(path.resolve()), encoding="utf-8")
            _rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as err:
        raise FailedPreconditionError(
            f"cannot keep {path.name}, converted, in {folder.parent}: {err}; set REDMUX_CACHE to a "
            "folder with room for it that can be written"
        ) from err


def _rename(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process may have won the race
            raise


def _remove_older(path: Path, folder: Path, content: str) -> None:
    """Removes what was made of earlier contents of this file, and what nobody has used lately.

    Folders of the same content stay: another version of redmux may use them.
    """
    source = str(path.resolve())
    for other in folder.parent.glob("*/" + _SOURCE):
        is_same_content = other.parent.name.rpartition("-")[0].endswith(content)
        if not is_same_content and other.read_text(encoding="utf-8") == source:
            remove(other.parent)
    remove_unused(folder.parent)
    remove_unused(folder.parent.with_name("files"))
