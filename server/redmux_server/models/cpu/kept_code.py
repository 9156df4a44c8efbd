"""What was compiled, in files that later starts and other processes find."""

import errno
import fcntl
import hashlib
import logging
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from redmux_adapters.bases.cache import (
    cache_folder,
    digest_of_files,
    mark_used,
    remove_unused,
)

logger = logging.getLogger(__name__)

# Whose numbers are part of machine code, beside the modules here.
BELOW = ("kvcache.py", "layer_norm.py")
_LOOK_S = 0.05
_LONGEST_S = 300.0  # that a function of another process is waited for
_MISSING = (errno.ENOENT, errno.ENOTDIR)
_BROKEN = (OSError, EOFError, ValueError, pickle.UnpicklingError)


@cache
def folder() -> Path:
    """Returns where code is kept: a folder for these sources of all kernels.

    numba alone would look at the file of a function only, and go on with what it compiled before
    one of another module was changed.
    """
    here = Path(__file__).parent
    sources = [*sorted(here.glob("*.py")), *(here.parent / name for name in BELOW)]
    key = digest_of_files(sources, numba.__version__, llvmlite.__version__)
    path = cache_folder() / "kernels" / key[:16]
    if path.is_dir():
        mark_used(path)
    return path


@cache
def make_room() -> None:
    """Removes, once, what nobody has used for long."""
    remove_unused(folder().parent)


class KeptCode:
    """The compiled forms of a function; where a file is broken, it is as if it were not there.

    Each has a file of its own, named for all that it depends on, so that processes which write at
    the same time cannot take one for another.
    """

    def __init__(self, function: Callable[..., Any], kind: str) -> None:
        """`kind` tells forms of the same function apart."""
        self._kind = kind
        code = function.__code__
        self._source = Path(code.co_filename)
        self._name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        self._line = code.co_firstlineno

    def load(self, sig: Any, target_context: Any) -> Any:
        """Returns numba's result for arguments of these types, or None."""
        path = self._path(sig, target_context)
        try:
            target_context.refresh()
            return CompileResult._rebuild(target_context, *pickle.loads(path.read_bytes()))
        except _BROKEN as err:
            if not (isinstance(err, OSError) and err.errno in _MISSING):
                logger.warning("compiled code in %s is ignored: %r", path, err)
            return None

    def save(self, sig: Any, result: Any) -> None:
        """Keeps numba's result for arguments of these types."""
        path = self._path(sig, result.target_context)
        make_room()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
            with os.fdopen(descriptor, "wb") as file:
                file.write(dumps(result._reduce()))
            Path(temporary).rename(path)
        except OSError as err:
            logger.warning("cannot keep compiled code in %s: %r", path.parent, err)

    @contextmanager
    def alone(self, sig: Any, target_context: Any) -> Iterator[None]:
        """Waits while another process compiles the same, which is then there to be loaded.

        Nobody is waited for where files cannot be locked, as without a folder to write to.
        """
        path = self._path(sig, target_context).with_suffix(".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            yield
            return
        try:
            _wait_for(descriptor, self._name)
            yield
        finally:
            # Who waits for this very file gets it still; who comes later makes another.
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def _path(self, sig: Any, target_context: Any) -> Path:
        args = sig.args if hasattr(sig, "args") else sig
        machine = target_context.codegen().magic_tuple()
        key = repr((*map(str, args), machine, self._kind, self._line))
        digest = hashlib.sha256((digest_of_files([self._source]) + key).encode())
        return folder() / f"{self._name}.{digest.hexdigest()[:24]}.nbc"


def _wait_for(descriptor: int, name: str) -> None:
    give_up_s = time.monotonic() + _LONGEST_S
    is_told = False
    while not _take(descriptor) and time.monotonic() < give_up_s:
        if not is_told:
            logger.info("another process compiles %s, which is waited for", name)
            is_told = True
        time.sleep(_LOOK_S)


def _take(descriptor: int) -> bool:
    """Whether the file is this process's now, or there are no locks on its file system."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        return not isinstance(err, BlockingIOError)
    return True
