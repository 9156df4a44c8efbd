import json
from datetime import UTC, datetime

import pytest

import redmux

ADAPTER = redmux.Adapter(
    name="acme/tales",
    digest="sha256:" + "ab" * 32,
    base_fingerprint="base-1",
    num_sites=30,
    num_parameters=34_560,
    size_bytes=138_240,
    description="in rhyme",
    created_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    base_match="same",
    apply="all",
    version=3,
    aliases=(redmux.AdapterAlias("next", 3), redmux.AdapterAlias("prod", 2)),
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"vectors")
    (tmp_path / "adapter_config.json").write_text('{"r": "\u00e9"}', encoding="utf-8")
    (tmp_path / "README.md").write_text("not sent")
    return tmp_path


def sent(server):
    request = server.calls[-1].request
    return request.safetensors, request.config_json


def test_put_returns_the_adapter(client):
    assert client.adapters.put("acme/tales", b"vectors") == ADAPTER


def test_put_sends_bytes(client, server):
    client.adapters.put("acme/tales", b"vectors")
    assert server.calls[-1].request.name == "acme/tales"
    assert sent(server) == (b"vectors", "")


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_put_sends_a_folder(client, server, folder, kind):
    client.adapters.put("acme/tales", kind(folder))
    assert sent(server) == (b"vectors", '{"r": "\u00e9"}')


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_put_sends_a_lone_file(client, server, folder, kind):
    client.adapters.put("acme/tales", kind(folder / "adapter_model.safetensors"))
    assert sent(server) == (b"vectors", "")


def test_a_config_is_json_text_or_a_mapping(client, server):
    client.adapters.put("acme/tales", b"vectors", config='{"r": 1}')
    assert sent(server) == (b"vectors", '{"r": 1}')
    client.adapters.put("acme/tales", b"vectors", config={"r": [1, "x"]})
    assert json.loads(sent(server)[1]) == {"r": [1, "x"]}


def test_a_config_takes_the_place_of_the_folders_own(client, server, folder):
    (folder / "adapter_config.json").unlink()
    client.adapters.put("acme/tales", folder, config="{}")
    assert sent(server) == (b"vectors", "{}")


def test_put_replaces_only_if_told_to(client, server):
    client.adapters.put("acme/tales", b"")
    assert not server.calls[-1].request.replace
    client.adapters.put("acme/tales", b"", replace=True)
    assert server.calls[-1].request.replace


@pytest.mark.parametrize("missing", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_folder_without_one_of_its_files_is_an_os_error(client, server, folder, missing):
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        client.adapters.put("acme/tales", folder)
    assert server.calls == []


def test_a_missing_file_is_an_os_error(client, tmp_path):
    with pytest.raises(FileNotFoundError):
        client.adapters.put("acme/tales", tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("name", "source", "config"),
    [
        ("a", 3, None),
        ("a", None, None),
        ("a", "model.pt", None),
        ("a", b"", 3),
        ("a", b"", {"r": float("nan")}),
        ("a", b"", {"r": set()}),
        (3, b"", None),
        (None, b"", None),
    ],
    ids=repr,
)
def test_arguments_of_a_wrong_kind_are_refused_before_anything_is_sent(
    client, server, name, source, config
):
    with pytest.raises(redmux.InvalidArgumentError):
        client.adapters.put(name, source, config=config)
    assert server.calls == []


def test_get_returns_the_adapter(client, server):
    server.adapters["acme/tales"] = server.adapter("acme/tales")
    assert client.adapters.get("acme/tales") == ADAPTER


def test_delete_returns_what_the_name_stood_for(client, server):
    server.adapters["acme/tales"] = server.adapter("acme/tales")
    assert client.adapters.delete("acme/tales") == ADAPTER
    assert server.adapters == {}


@pytest.mark.parametrize("method", ["get", "delete"])
def test_an_unknown_name_is_not_found(client, method):
    with pytest.raises(redmux.NotFoundError, match="no adapter 'acme/none'"):
        getattr(client.adapters, method)("acme/none")


@pytest.mark.parametrize("method", ["get", "delete"])
def test_a_name_that_is_no_text_is_refused(client, server, method):
    with pytest.raises(redmux.InvalidArgumentError):
        getattr(client.adapters, method)(None)
    assert server.calls == []


@pytest.mark.parametrize(("count", "num_pages"), [(0, 1), (2, 1), (3, 2), (5, 3)])
def test_list_yields_the_adapters_of_all_pages(client, server, count, num_pages):
    server.page_size = 2
    names = [f"acme/{number}" for number in range(count)]
    server.adapters = {name: server.adapter(name) for name in names}
    assert [adapter.name for adapter in client.adapters.list()] == names
    assert len(server.calls) == num_pages


def test_the_adapters_themselves_are_iterated_over(target, server):
    server.page_size = 2
    server.adapters = {name: server.adapter(name) for name in "abc"}
    with redmux.Client(target) as client:
        assert [adapter.name for adapter in client.adapters] == ["a", "b", "c"]


async def test_the_adapters_themselves_are_iterated_over_asynchronously(target, server):
    server.page_size = 2
    server.adapters = {name: server.adapter(name) for name in "abc"}
    async with redmux.AsyncClient(target) as client:
        assert [adapter.name async for adapter in client.adapters] == ["a", "b", "c"]


def test_list_asks_for_a_page_when_it_is_needed(client, server):
    server.page_size = 2
    server.adapters = {name: server.adapter(name) for name in "abcdef"}
    adapters = client.adapters.list()
    assert server.calls == []
    assert next(adapters).name == "a"
    assert len(server.calls) == 1
    adapters.close()


def test_a_version_is_named_by_a_number_or_a_text(client, server):
    server.adapters["acme/tales"] = server.adapter("acme/tales")
    for version in (3, "latest", "sha256:abababab"):
        assert client.adapters.set_alias("acme/tales", "prod", version) == ADAPTER
        assert server.aliases == {("acme/tales", "prod"): str(version)}
    client.adapters.delete_alias("acme/tales", "prod")
    assert server.aliases == {}
    with pytest.raises(redmux.InvalidArgumentError, match="not float"):
        client.adapters.set_alias("acme/tales", "prod", 1.5)


def test_versions_of_a_name_are_listed_and_files_come_back(client, server):
    server.adapters["acme/tales"] = server.adapter("acme/tales")
    assert list(client.adapters.list("acme/tales")) == [ADAPTER]
    assert server.calls[-1].request.name == "acme/tales"
    assert client.adapters.download("acme/tales@3") == b"vectors"
    assert server.calls[-1].request.name == "acme/tales@3"
