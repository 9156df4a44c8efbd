"""Stored files that are found damaged at start: their names fail, and nothing else does."""

import pytest

from redmux.errors import DataLossError, FailedPreconditionError, NotFoundError, WrongBaseError
from redmux_adapters import to_bytes
from redmux_adapters.format.files import to_sealed_bytes
from redmux_server.registry.given import read_given

A, B = "key-a", "key-b"


def flip(data, index, bit=0):
    damaged = bytearray(data)
    damaged[index] ^= 1 << bit
    return bytes(damaged)


DAMAGES = {
    "last bit": lambda data: flip(data, -1),
    "a scale": lambda data: flip(data, len(data) - 20, 3),
    "description": lambda data: data.replace(b"for people", b"for peoplf"),
    "header": lambda data: flip(data, 8),
    "owner": lambda data: data.replace(b'"owner":""', b'"owner":"key-b"'),
    "cut": lambda data: data[: len(data) // 2],
    "cut in the last value": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
}


async def store(folder, open_registry, make_adapter, tenant):
    from redmux_adapters import AdapterMetadata

    registry = open_registry(folder)
    metadata = AdapterMetadata(description="for people")
    for name, seed in {"team/x": 1, "good": 2}.items():
        file = to_bytes(make_adapter(seed, metadata=metadata))
        await registry.put(name, file, "", False, tenant)
    return folder / "team" / "x.safetensors"


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_file_is_data_loss_of_its_name_and_the_others_serve(
    damage, tmp_path, open_registry, make_adapter, caplog
):
    path = await store(tmp_path, open_registry, make_adapter, "")
    before = path.read_bytes()
    path.write_bytes(DAMAGES[damage](before))
    registry = open_registry(tmp_path)
    assert registry.unusable == [path]
    assert str(path) in caplog.text
    for _ in range(2):
        with pytest.raises(DataLossError, match="adapter 'team/x' is damaged; put the adapter"):
            registry.resolve("team/x")
    assert [p.name for p in registry.page("", 9)] == ["good"]
    assert registry.resolve("good").read().digest == make_adapter(2).digest


async def test_putting_a_damaged_adapter_again_heals_it(tmp_path, open_registry, make_adapter):
    path = await store(tmp_path, open_registry, make_adapter, A)
    path.write_bytes(flip(path.read_bytes(), -1))
    registry = open_registry(tmp_path)
    await registry.put("team/x", to_bytes(make_adapter(1)), "", False, A)
    for opened in (registry, open_registry(tmp_path)):
        assert opened.resolve("team/x", A).read().digest == make_adapter(1).digest


async def test_a_damaged_file_is_its_owners(tmp_path, open_registry, make_adapter, files):
    path = await store(tmp_path, open_registry, make_adapter, A)
    path.write_bytes(flip(path.read_bytes(), -1))
    registry = open_registry(tmp_path)
    with pytest.raises(DataLossError):
        registry.resolve("team/x", A)
    with pytest.raises(DataLossError):
        await registry.delete("team/x", A)
    with pytest.raises(NotFoundError):
        registry.resolve("team/x", B)
    with pytest.raises(NotFoundError):
        await registry.put("team/x", files[0], "", True, B)
    with pytest.raises(NotFoundError):
        await registry.delete("team/x", B)
    assert path.exists()


async def test_a_damaged_file_whose_owner_nobody_knows_is_the_admins_to_mend(
    tmp_path, open_registry, make_adapter, files
):
    path = await store(tmp_path, open_registry, make_adapter, A)
    path.write_bytes(b"")
    registry = open_registry(tmp_path)
    with pytest.raises(NotFoundError):
        registry.resolve("team/x", A)
    with pytest.raises(NotFoundError):
        await registry.put("team/x", files[0], "", True, A)
    await registry.put("team/x", files[0], "", False, "admin")
    assert registry.resolve("team/x", B).owner == ""


async def test_a_damaged_file_is_not_replaced_by_what_was_given_at_start(
    tmp_path, open_registry, make_adapter, files, caplog
):
    path = await store(tmp_path / "kept", open_registry, make_adapter, "")
    path.write_bytes(flip(path.read_bytes(), -1))
    other = tmp_path / "other.safetensors"
    other.write_bytes(files[0])
    registry = open_registry()
    registry = type(registry)("tiny-2x4-0", registry._rules.expected_sites, tmp_path / "kept")
    registry.load(*read_given([f"team/x={other}"]))
    registry.load_folder()
    with pytest.raises(DataLossError):
        registry.resolve("team/x")
    assert "adapter team/x of the option adapters is not served" in caplog.text


async def test_a_file_of_another_base_model_says_so_and_gives_way_to_what_is_given(
    tmp_path, open_registry, make_adapter, files
):
    (tmp_path / "x.safetensors").write_bytes(to_sealed_bytes(make_adapter(0, "other-base"), A))
    registry = open_registry(tmp_path)
    with pytest.raises(FailedPreconditionError, match=r"'x' cannot be used: .*other-base") as found:
        registry.resolve("x", A)
    assert not isinstance(found.value, WrongBaseError)
    with pytest.raises(NotFoundError):
        await registry.put("x", files[0], "", True, B)
    registry = type(registry)("tiny-2x4-0", registry._rules.expected_sites, tmp_path)
    other = tmp_path / "given"
    other.write_bytes(files[0])
    registry.load(*read_given([f"x={other}"]))
    registry.load_folder()
    assert registry.resolve("x", B).read().digest == make_adapter(0).digest


def test_a_sound_file_with_modules_of_another_model_is_not_called_damaged(
    tmp_path, open_registry, make_adapter
):
    stranger = make_adapter(0, sites={"model.layers.9.mlp.down_proj": 4})
    (tmp_path / "x.safetensors").write_bytes(to_bytes(stranger))
    with pytest.raises(FailedPreconditionError, match="modules"):
        open_registry(tmp_path).resolve("x")


async def test_a_file_without_a_checksum_gets_one_when_it_is_put(
    tmp_path, open_registry, adapters, files
):
    path = tmp_path / "x.safetensors"
    path.write_bytes(files[0])
    registry = open_registry(tmp_path)
    _, changed = await registry.put("x", files[0], "", False)
    assert not changed
    assert path.read_bytes() == to_sealed_bytes(adapters[0], "")
    path.write_bytes(flip(path.read_bytes(), -1))
    with pytest.raises(DataLossError):
        open_registry(tmp_path).resolve("x")
