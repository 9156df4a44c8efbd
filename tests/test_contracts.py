"""What holds for the project as a whole."""

import ast
import asyncio
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import redmux

ROOT = Path(__file__).resolve().parents[1]
# Each package with what it may import of the others.
PACKAGES = {
    "client/redmux": {"redmux"},
    "adapters/redmux_adapters": {"redmux", "redmux_adapters"},
    "server/redmux_server": {"redmux", "redmux_adapters", "redmux_server"},
    "bench/redmux_bench": {"redmux", "redmux_adapters", "redmux_server", "redmux_bench"},
}
# Commands that hand over to another package where it is installed.
HAND_OVERS = {"client/redmux/cli.py"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        if path.relative_to(ROOT).as_posix() in HAND_OVERS:
            continue
        own = {name for name in imports(path) if name.startswith("redmux")}
        assert own <= PACKAGES[package], path


def test_the_scheduler_leaves_torch_alone():
    code = "import sys, redmux_server.engine.scheduler; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_wheel_installs_four_packages_and_the_bundled_adapters(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "--wheel-dir", tmp_path, ROOT], check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"redmux", "redmux_adapters", "redmux_bench", "redmux_server"}
    for name in ("redmux/py.typed", "redmux/v1/inference_service_pb2.pyi"):
        assert name in names
    assert "redmux_adapters/zoo/pirate/adapter_model.safetensors" in names
    assert "redmux_adapters/zoo/grammar/README.md" in names


def test_the_changelog_speaks_of_this_version():
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == redmux.__version__


def test_links_in_the_documents_lead_somewhere():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / link).exists(), (path, link)


async def test_the_python_of_the_readme_runs(base, server, client, put, capsys):
    await put("pirate", base.adapter(1))
    await put("assistant-json", base.adapter(2))
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = block.replace("localhost:50051", f"127.0.0.1:{server.port}")
    await asyncio.to_thread(exec, code, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("None None ")
    assert lines[1].startswith(f"pirate {base.adapter(1).digest} ")
