"""docs/api.md is what docs/generate_api.py writes."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_api", DOCS / "generate_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_code_gives(generator):
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), "run `make api`"


@pytest.mark.parametrize("place", [1, 2, 3], ids=["HTTP", "gRPC", "Python"])
def test_what_no_task_names_is_told(generator, monkeypatch, place):
    tasks = [[*task[:place], "", *task[place + 1 :]] for task in generator.TASKS]
    monkeypatch.setattr(generator, "TASKS", tasks)
    with pytest.raises(ValueError, match=r"^TASKS of generate_api\.py: "):
        generator.page()


def test_a_method_that_only_one_client_has_is_told(generator, monkeypatch):
    monkeypatch.delattr(generator.redmux.AsyncClient, "embed")
    with pytest.raises(ValueError, match=r"AsyncClient lacks \['embed'\]"):
        generator.page()
