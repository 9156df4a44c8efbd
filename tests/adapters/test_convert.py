import os
import subprocess
import sys
import zipfile

import pytest
import torch
from official import official

from redmux.errors import InvalidAdapterError
from redmux_adapters.convert import convert_delta_vector
from redmux_adapters.convert.worker import check_archive, read_vectors

SCALE, BIAS = ".delta_vector.activation_scaling", ".delta_vector.activation_bias"
BASE = "gpt2-4x1-0"


@pytest.fixture(autouse=True)
def sparse_checks_as_before():
    """read_vectors switches them on, for its own process as it thinks."""
    yield
    torch.sparse.check_sparse_tensor_invariants.disable()


def write(path, content, **options):
    torch.save(content, path, **options)
    return str(path)


# Name, parameters, and the millions that the paper gives (arXiv 2402.15179), where it does.
OFFICIAL_FILES = [
    ("roberta-base-qnli", 18_432, 0.02),
    ("roberta-base-qnli-redpp", 92_160, 0.09),
    ("gpt2-medium-e2e", 49_152, 0.05),
    ("gpt2-medium-e2e-redpp", 245_760, None),
    ("llama2-7b", 262_144, 0.26),
    ("t5-base-qnli", 36_864, 0.04),
]


@pytest.mark.parametrize(("name", "parameters", "millions"), OFFICIAL_FILES)
def test_official_vectors_keep_values_and_count(name, parameters, millions):
    path = official(name)
    vectors = read_vectors(str(path))
    original = torch.load(path, map_location="cpu", weights_only=True)
    assert sum(vector.numel() for vector in vectors.values()) == parameters
    assert millions in (None, round(parameters / 1e6, 2))
    assert len(vectors) == len(original)
    for key, value in original.items():
        site = key.partition(".delta_vector.")[0]
        kind = "scale" if key.endswith("scaling") else "bias"
        assert torch.equal(vectors[f"{site}.{kind}"], value[0])


def test_official_bf16_file_becomes_an_adapter(tmp_path, monkeypatch):
    path = official("llama2-7b")
    (tmp_path / "torch.py").write_text("raise SystemExit('modules of the working folder ran')")
    monkeypatch.chdir(tmp_path)
    sites = {f"model.layers.{layer}.mlp.down_proj": 4096 for layer in range(32)}
    adapter = convert_delta_vector(path, BASE, expected_sites=sites)
    assert adapter.sites == dict(sorted(sites.items()))
    original = torch.load(path, map_location="cpu", weights_only=True)
    for site, edit in adapter.edits.items():
        assert torch.equal(edit.scale, original[site + SCALE][0].float())
        assert torch.equal(edit.bias, original[site + BIAS][0].float())


def test_file_of_the_same_layout_is_converted(tmp_path):
    scale, bias = torch.rand(1, 4), torch.rand(1, 4, dtype=torch.float16)
    path = write(tmp_path / "v.pth", {"h.0.c_proj" + SCALE: scale, "h.1.c_proj" + BIAS: bias})
    adapter = convert_delta_vector(path, BASE)
    assert torch.equal(adapter.edits["h.0.c_proj"].scale, scale[0])
    assert torch.equal(adapter.edits["h.1.c_proj"].bias, bias[0].float())
    assert adapter.edits["h.1.c_proj"].scale.tolist() == [1] * 4
    assert adapter.base_fingerprint == BASE


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    path = write(tmp_path / "v.pth", {"m" + BIAS: Malicious(tmp_path / "ran")})
    with pytest.raises(InvalidAdapterError, match=r"unsupported GLOBAL posix\.mkdir"):
        convert_delta_vector(path, BASE)
    assert not (tmp_path / "ran").exists()


def test_non_finite_values_are_refused_by_name(tmp_path):
    path = write(tmp_path / "v.pth", {"m" + BIAS: torch.tensor([[0, float("nan")]])})
    with pytest.raises(InvalidAdapterError, match=r"'m\.bias' has 1 non-finite .* index 1"):
        convert_delta_vector(path, BASE)


def test_conversion_is_killed_when_it_takes_too_long(tmp_path):
    path = write(tmp_path / "v.pth", {"m" + BIAS: torch.ones(1, 4)})
    with pytest.raises(InvalidAdapterError, match=r"not be converted within 0\.01 s"):
        convert_delta_vector(path, BASE, timeout_s=0.01)


def test_worker_that_dies_is_reported(tmp_path, monkeypatch):
    path = write(tmp_path / "v.pth", {"m" + BIAS: torch.ones(1, 4)})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(InvalidAdapterError, match="the converter ended with code 1"):
        convert_delta_vector(path, BASE)


def test_worker_cannot_take_more_than_its_limits():
    program = (
        "import torch, resource\n"
        "from redmux_adapters.convert.worker import limit_resources\n"
        "limit_resources()\n"
        "assert resource.getrlimit(resource.RLIMIT_CPU)[0] <= 60\n"
        "assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] <= 65 << 20\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= 64\n"
        "torch.empty(1 << 30, dtype=torch.uint8)\n"
        "try:\n"
        "    torch.empty(3 << 30, dtype=torch.uint8)\n"
        "except RuntimeError:\n"
        "    raise SystemExit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 7


def test_links_and_oversized_files_are_refused_unopened(tmp_path):
    path = write(tmp_path / "v.pth", {"m" + BIAS: torch.ones(1, 4)})
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(InvalidAdapterError, match="symbolic link"):
        convert_delta_vector(tmp_path / "link", BASE)
    with (tmp_path / "big").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(InvalidAdapterError, match="has 67108865 bytes; limit 67108864"):
        convert_delta_vector(tmp_path / "big", BASE)


def out_of_bounds():
    return torch.sparse_coo_tensor([[5]], torch.ones(1), (3,), check_invariants=False)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([1], "holds 'list'; a delta_vector.pth holds a dictionary"),
        ({}, "holds 'dict'"),
        ({"m.weight": torch.ones(1, 4)}, "unexpected entry 'm.weight'; names end in .delta_vec"),
        ({3: torch.ones(1, 4)}, "unexpected entry 3"),
        ({"../m" + BIAS: torch.ones(1, 4)}, "'../m' is no module path"),
        ({BIAS: torch.ones(1, 4)}, "module path '' has 0"),
        ({"m" + BIAS: "text"}, "is 'str', not a tensor"),
        ({"m" + BIAS: torch.ones(2, 4)}, r"shape \[2, 4\]; it has to be \[1, hidden size\]"),
        ({"m" + BIAS: torch.ones(())}, r"shape \[\]"),
        ({"m" + BIAS: torch.ones(1, 0)}, r"shape \[1, 0\]"),
        ({"m" + BIAS: torch.ones(1, 4, dtype=torch.float64)}, "dtype torch.float64; allowed"),
        ({"m" + BIAS: torch.ones(1, 4, device="meta")}, "tensor on meta"),
        ({"m" + BIAS: torch.ones(1).expand(1, 2**40)}, "claims 1099511627776 values at stride 0"),
        ({"m" + BIAS: torch.ones(8).as_strided((1, 8), (8, 0))}, "claims 8 values at stride 0"),
        ({"m" + BIAS: torch.ones(8)[::2]}, "claims 4 values at stride 2"),
        ({"m" + BIAS: torch.ones(3).to_sparse()}, "torch.sparse_coo tensor on cpu"),
        ({"m" + BIAS: out_of_bounds()}, "torch refuses the file: 'size is inconsistent"),
        (
            {"m" + BIAS: torch.ones(1, 4), "module.m" + BIAS: torch.ones(1, 4)},
            "'m.bias' occurs twice, under different prefixes",
        ),
        (
            {f"{i}{BIAS}": torch.ones(1) for i in range(4097)},
            "holds 4097 entries; limit 4096",
        ),
    ],
)  # fmt: skip
def test_anything_but_plain_vectors_is_refused(tmp_path, content, error):
    path = write(tmp_path / "v.pth", content)
    with pytest.raises(InvalidAdapterError, match=error):
        read_vectors(path)


def test_many_views_of_one_storage_are_not_multiplied(tmp_path):
    shared = torch.ones(1, 1 << 18)  # 1 MiB
    path = write(tmp_path / "v.pth", {f"m.{i}{BIAS}": shared for i in range(65)})
    assert os.path.getsize(path) < 2 << 20
    with pytest.raises(InvalidAdapterError, match="the vectors exceed 67108864 bytes"):
        read_vectors(path)


@pytest.mark.parametrize("prefix", ["", "module.", "base_model.", "module.base_model."])
def test_wrapper_prefixes_are_stripped(tmp_path, prefix):
    path = write(tmp_path / "v.pth", {f"{prefix}model.layers.0.x{BIAS}": torch.ones(1, 2)})
    assert list(read_vectors(path)) == ["model.layers.0.x.bias"]


def test_views_and_parameters_are_copied_out(tmp_path):
    whole = torch.arange(10.0)
    content = {"a" + BIAS: whole[3:6], "b" + SCALE: torch.nn.Parameter(whole[None])}
    vectors = read_vectors(write(tmp_path / "v.pth", content))
    assert vectors["a.bias"].tolist() == [3, 4, 5]
    assert vectors["a.bias"].untyped_storage().nbytes() == 12
    assert vectors["b.scale"].tolist() == whole.tolist()


def repack(path, **options):
    """Packs a torch.save file again, for example with compression."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in entries:
            archive.writestr(name, data)


def test_archives_that_inflate_are_refused_before_unpickling(tmp_path):
    path = write(tmp_path / "v.pth", {"m" + BIAS: torch.zeros(1, 17 << 20)})
    repack(path, compression=zipfile.ZIP_DEFLATED)
    assert os.path.getsize(path) < 1 << 20
    with pytest.raises(InvalidAdapterError, match=r"unpacks to 713\d+ bytes; limit 67108864"):
        check_archive(path)
    with pytest.raises(InvalidAdapterError, match="unpacks to"):
        read_vectors(path)


def test_compressed_archives_are_refused(tmp_path):
    path = write(tmp_path / "v.pth", {"m" + BIAS: torch.zeros(1, 4)})
    repack(path)
    check_archive(path)
    repack(path, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InvalidAdapterError, match="is compressed, which torch"):
        check_archive(path)


def test_files_that_are_no_archives_are_refused(tmp_path):
    old = write(
        tmp_path / "old", {"m" + BIAS: torch.ones(1, 4)}, _use_new_zipfile_serialization=False
    )
    (tmp_path / "noise").write_bytes(b"\x80\x02" + b"x" * 100)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("data", b"x")
    for path in (old, tmp_path / "noise"):
        with pytest.raises(InvalidAdapterError, match="the file is no zip archive"):
            read_vectors(str(path))
    with pytest.raises(InvalidAdapterError, match="torch refuses the file"):
        read_vectors(str(tmp_path / "other.zip"))
