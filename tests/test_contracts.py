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
# The floors of a package, from the ground up: its modules and the wings of its modules. Each uses
# what lies below it; those of the ground floor use each other.
FLOORS = {
    "adapters/redmux_adapters": ["bases", "format", "text", "convert fold show train", "cli"],
    "server/redmux_server": [
        "config descriptors device engine fair_thread keys leaving metrics metrics_port",
        "models",
        "registry",
        "training",
        "services",
        "wiring",
        "grpc_api",
        "doors",
        "app",
        "cli",
    ],
    "server/redmux_server/models": [
        "base_model compilation editing kvcache layer_norm proving text",
        "cpu",
        "causal",
        "cuda",
        "encoder seq2seq",
        "load_causal",
        "load",
    ],
}
# Commands that hand over to another package where it is installed.
HAND_OVERS = {"client/redmux/cli.py"}


def imports(path):
    """Yields the dotted names that a module imports: modules, and what may be modules in them."""
    package = path.relative_to(ROOT).with_suffix("").parts[1:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        if path.relative_to(ROOT).as_posix() in HAND_OVERS:
            continue
        tops = {name.partition(".")[0] for name in imports(path)}
        assert {top for top in tops if top.startswith("redmux")} <= PACKAGES[package], path


@pytest.mark.parametrize("package", FLOORS)
def test_inside_a_package_dependencies_point_down(package):
    floor_of = {name: i for i, names in enumerate(FLOORS[package]) for name in names.split()}
    prefix = package.partition("/")[2].replace("/", ".") + "."
    for path in (ROOT / package).rglob("*.py"):
        own = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in imports(path):
            wing = name.removeprefix(prefix).partition(".")[0]
            if not name.startswith(prefix) or wing == own or wing not in floor_of:
                continue
            both = floor_of[own], floor_of[wing]
            assert both[1] < both[0] or both == (0, 0), f"{path} imports {name}"


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
