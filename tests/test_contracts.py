"""What holds for the project as a whole."""

import ast
import email
import json
import re
import subprocess
import sys
import tarfile
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
    "adapters/redmux_adapters": [
        "bases",
        "format",
        "text",
        "convert fold mixing show train",
        "cli",
    ],
    "server/redmux_server": [
        "config descriptors device durable engine fair_thread in_flight internal_errors keys "
        "leaving load metrics metrics_port",
        "models",
        "registry files",
        "training",
        "services batches tuning",
        "wiring",
        "grpc_api http_api",
        "doors",
        "app",
        "first_start",
        "cli",
    ],
    "server/redmux_server/models": [
        "base_model compilation editing kvcache layer_norm lean_imports proving settle text"
        " token_bytes too_long",
        "cpu",
        "causal",
        "cuda",
        "encoder seq2seq",
        "load_causal",
        "load",
    ],
}
# What is given out: each package with the folder that its distribution is built from.
DISTRIBUTIONS = {
    "redmux": ".",
    "redmux_adapters": "adapters",
    "redmux_server": "server",
    "redmux_bench": "bench",
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
        assert own in floor_of, f"{path} has no floor"
        for name in imports(path):
            wing = name.removeprefix(prefix).partition(".")[0]
            if not name.startswith(prefix) or wing == own or wing not in floor_of:
                continue
            both = floor_of[own], floor_of[wing]
            assert both[1] < both[0] or both == (0, 0), f"{path} imports {name}"


def test_what_tests_of_clients_share_needs_nothing_of_the_projects_environment():
    tests = ROOT / "tests"
    # The server and direct.py run in the project's environment.
    left = [path for path in (tests / "clients").glob("*.py") if path.name != "direct.py"]
    for path in left:  # grows while it is walked
        tree = ast.parse(path.read_text())
        # What a function imports is for those who call it.
        body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in body:
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            for name in names:
                assert name != "conftest", f"{path.name} would get that of tests/clients"
                assert not name.startswith("redmux"), f"{path.name} imports {name}"
                shared = tests / f"{name}.py"
                if shared.exists() and shared not in left:
                    left.append(shared)
    assert tests / "chat_templates.py" in left


def test_the_scheduler_leaves_torch_alone():
    code = "import sys, redmux_server.engine.scheduler; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """The folder of all wheels and source archives, built as they are given out."""
    folder = tmp_path_factory.mktemp("dist")
    for source in DISTRIBUTIONS.values():
        build(ROOT / source, folder)
    return folder


def build(source, target, *kinds):
    command = [sys.executable, "-m", "hatchling", "build", "-d", target, *kinds]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


def files_of(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def metadata_of(folder, name):
    (wheel,) = folder.glob(f"{name}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(path))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_each_wheel_holds_its_own_package_and_no_other(artefacts, name):
    (wheel,) = artefacts.glob(f"{name}-*.whl")
    package = ROOT / (DISTRIBUTIONS[name] if name != "redmux" else "client")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", name],
        cwd=package, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    existing = {path for path in tracked if (package / path).exists()}
    assert files_of(wheel) == existing
    assert ("redmux_adapters/zoo/pirate/adapter_model.safetensors" in existing) == (
        name == "redmux_adapters"
    )


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_source_archive_builds_the_same_wheel_elsewhere(artefacts, name, tmp_path):
    (archive,) = artefacts.glob(f"{name}-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    build(source, tmp_path / "dist", "-t", "wheel")
    (here,), (there,) = artefacts.glob(f"{name}-*.whl"), (tmp_path / "dist").glob("*.whl")
    assert zipfile.ZipFile(here).namelist() == zipfile.ZipFile(there).namelist()


def test_the_client_needs_neither_torch_nor_the_server(artefacts):
    needs = metadata_of(artefacts, "redmux").get_all("Requires-Dist")
    always = {re.split(r"[<>=]", need)[0] for need in needs if "extra ==" not in need}
    assert always == {"grpcio", "protobuf"}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_all_distributions_have_one_version_and_need_each_other_in_it(artefacts, name):
    found = metadata_of(artefacts, name)
    assert found["Version"] == redmux.__version__
    own = [need for need in found.get_all("Requires-Dist") if need.startswith("redmux")]
    assert own
    for need in own:
        assert f"=={redmux.__version__}" in need


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_an_index_can_show_each_distribution(artefacts, name):
    found = metadata_of(artefacts, name)
    for field in ("Summary", "Author", "Keywords", "Project-URL", "License-Expression"):
        assert found[field], field
    assert len(found.get_all("Classifier")) > 5
    assert "LICENSE" in found.get_all("License-File")
    assert not re.findall(r"\]\((?!https://)", found.get_payload())  # links have no place there


def test_every_copy_of_the_licence_is_the_same():
    for source in DISTRIBUTIONS.values():
        assert (ROOT / source / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_licence_of_every_bundled_adapter_is_listed_and_free(artefacts):
    listed = dict(
        re.findall(
            r"^\| ([\w-]+) \| ([\w.-]+) \|", (ROOT / "adapters/LICENCES.md").read_text(), re.M
        )
    )
    zoo = ROOT / "adapters/redmux_adapters/zoo"
    stated = {
        path.parent.name: json.loads(path.read_text())["license"]
        for path in zoo.glob("*/adapter_config.json")
    }
    assert listed == stated
    for name, licence in stated.items():
        assert "-NC" not in licence
        assert f"License of the vectors: {licence}" in (zoo / name / "README.md").read_text()
    found = metadata_of(artefacts, "redmux_adapters")
    assert set(found["License-Expression"].split(" AND ")) == {"Apache-2.0", *stated.values()}
    assert "LICENCES.md" in found.get_all("License-File")


def test_the_changelog_speaks_of_this_version():
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == redmux.__version__
