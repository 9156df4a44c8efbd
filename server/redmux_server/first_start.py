"""What only the first start on a machine has to do, begun as early as can be."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

from redmux._installed import kernels_folder
from redmux_server.config import ServerConfig
from redmux_server.models.cpu.precision import choose_kv_dtype, choose_precision

logger = logging.getLogger(__name__)

_GPU = Path("/dev/nvidiactl")


def compile_ahead(config: ServerConfig) -> None:
    """Starts a process that compiles kernels, if none are kept and the model may need them.

    It works beside the imports and the conversion of the model, and ends with this process.
    """
    folder = kernels_folder(os.environ)  # told without torch, whose import takes seconds
    if folder is None or any(folder.glob("decoder_pass.run.*.nbc")):
        return
    if config.dtype not in ("auto", "float32"):
        return
    if config.device == "cuda" or (config.device == "auto" and _GPU.exists()):
        return
    # Whether weights have 4 bits shows only once they are read.
    chosen, _ = choose_precision(config.quantization, is_fp32=True, is_on_grids=lambda: False)
    kv_dtype, _ = choose_kv_dtype(config.kv_dtype, chosen, "float32")
    served = f"{'fp32' if chosen == 'none' else chosen}:{kv_dtype}"
    passes = dict.fromkeys(("fp32:float32", served))  # the check's, which rounds nothing, first
    logger.info("kernels are compiled for this CPU beside the loading")
    process = subprocess.Popen(
        [sys.executable, "-m", "redmux_server.models.cpu.ahead", config.model, *passes],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    threading.Thread(target=process.wait, name="compiling ahead", daemon=True).start()
