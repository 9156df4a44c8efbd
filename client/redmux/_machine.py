"""What this machine gives, from the files in which Linux tells it; None where it does not."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Names in /proc/cpuinfo of what the kernels, torch's or ours, make use of.
_FEATURES = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8",
    "amx_bf16", "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip
_GPU_LIMIT_S = 5.0  # a driver that hangs


@dataclass(frozen=True, slots=True)
class Machine:
    """A Linux machine, below `root`."""

    root: Path = Path("/")

    def processor(self) -> str | None:
        """Returns the model's name."""
        return self._cpu_field("model name")

    def features(self) -> tuple[str, ...]:
        """Returns which of the vector instructions that matter the processor has."""
        has = (self._cpu_field("flags") or self._cpu_field("Features") or "").split()
        return tuple(name for name in _FEATURES if name in has)

    def memory_bytes(self) -> int | None:
        """Returns what new processes can have without swapping, within the limit of the cgroup."""
        lines = self._read("proc/meminfo").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        free = fields.get("MemAvailable")
        found = [] if free is None else [1024 * int(free.split()[0])]
        for folder in self._cgroups("memory"):
            limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
            used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
            if limit is not None:
                found.append(max(0, limit - (used or 0)))
        return min(found, default=None)

    def quota_cores(self) -> float | None:
        """Returns how many cores' time the cgroup may use, None for no limit."""
        quotas = []
        for folder in self._cgroups("cpu"):
            quota, _, period = _text(folder / "cpu.max").partition(" ")
            if not quota:
                quota = _text(folder / "cpu.cfs_quota_us")
                period = _text(folder / "cpu.cfs_period_us")
            if quota.isdecimal() and period.isdecimal():
                quotas.append(int(quota) / int(period))
        return min(quotas, default=None)

    def _cgroups(self, controller: str) -> Iterator[Path]:
        """Yields the folders that limit this process, from its own up to the root."""
        for line in self._read("proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = self.root / "sys/fs/cgroup" / (controllers and controller)
            folder = top / path.strip("/")
            # In a container the path is often that of the host, and the limits are at the top.
            while True:
                yield folder
                if folder == top or top not in folder.parents:
                    break
                folder = folder.parent

    def _cpu_field(self, name: str) -> str | None:
        for line in self._read("proc/cpuinfo").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
        return None

    def _read(self, path: str) -> str:
        return _text(self.root / path)


def num_cores() -> int:
    """Returns how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus() -> list[str]:
    """Returns a line for each of NVIDIA's GPUs, of those that their driver tells of."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GPU_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None
