"""Finds the packages beside this one in a checkout that is not installed; import it first."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [str(ROOT / folder) for folder in ("client", "adapters", "server", "bench")]

if importlib.util.find_spec("redmux") is None:
    sys.path[:0] = SOURCES
