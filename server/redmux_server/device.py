"""Choose device, dtype, threads and kernels once, and say why."""

import os
from dataclasses import dataclass

import torch

from redmux.errors import FailedPreconditionError
from redmux_server.config import ServerConfig


@dataclass(frozen=True, slots=True)
class Choices:
    """What the engine runs on, each with its reason."""

    device: torch.device
    dtype: torch.dtype
    num_threads: int
    reasons: tuple[str, ...]


def name_of(dtype: torch.dtype) -> str:
    """Returns what options and people call a dtype, such as float32."""
    return str(dtype).removeprefix("torch.")


def choose(config: ServerConfig) -> Choices:
    """Returns the choices for this machine.

    Raises FailedPreconditionError if the configuration asks for a device that is not there or
    for a quantization or a kv_dtype that device and dtype have not.
    """
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise FailedPreconditionError("device is cuda, but torch sees no CUDA device; use cpu")
    if config.device == "auto":
        name = "cuda" if has_cuda else "cpu"
        why = "auto: a CUDA device is present" if has_cuda else "auto: no CUDA device is present"
    else:
        name, why = config.device, "set by configuration"
    reasons = [f"device {name} ({why})"]

    if config.dtype != "auto":
        dtype, why = getattr(torch, config.dtype), "set by configuration"
    elif name == "cpu":
        dtype, why = torch.float32, "auto: exact, and the fastest on CPUs without bf16 products"
    else:
        dtype, why = torch.bfloat16, "auto: the native precision of current GPUs"
    dtype_name = name_of(dtype)
    reasons.append(f"dtype {dtype_name} ({why})")

    if config.quantization not in ("none", "auto") and (name, dtype) != ("cpu", torch.float32):
        raise FailedPreconditionError(
            f"quantization is {config.quantization}, which needs device cpu and dtype float32, "
            f"not {name} and {dtype_name}; use quantization none here"
        )
    if config.kv_dtype not in ("auto", dtype_name) and (name, dtype) != ("cpu", torch.float32):
        raise FailedPreconditionError(
            f"kv_dtype is {config.kv_dtype}, which needs device cpu and dtype float32, not {name} "
            f"and {dtype_name}; use kv_dtype auto here"
        )

    cores = len(os.sched_getaffinity(0))
    threads = config.threads or cores
    why = "set by configuration" if config.threads else "auto: every core of this process"
    reasons.append(f"threads {threads} ({why})")
    return Choices(torch.device(name), dtype, threads, tuple(reasons))
