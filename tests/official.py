"""The files that the authors of RED published, which are not part of the project."""

import os
from pathlib import Path

import pytest

FOLDER = Path(
    os.environ.get("RED_OFFICIAL_FILES")
    or Path(__file__).parents[1].parent / "shared" / "official_red"
)


def official(name: str, file: str = "delta_vector.pth") -> Path:
    """Returns the path of one of their files; skips the test where it is absent."""
    path = FOLDER / name / file
    if not path.is_file():
        pytest.skip(
            f"needs the authors' file {name}/{file}, in the folder shared/official_red beside the "
            "repository or in that of RED_OFFICIAL_FILES"
        )
    return path
