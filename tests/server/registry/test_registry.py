"""Names of adapters: what put, delete, page and resolve promise."""

import asyncio
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redmux._nearest import nearest
from redmux.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidAdapterError,
    InvalidArgumentError,
    NotFoundError,
    WrongBaseError,
)
from redmux_adapters import AdapterMetadata, Head, HeadConfig, to_bytes, write_folder
from redmux_server.registry import registry as registry_module
from redmux_server.registry.given import read_given
from redmux_server.registry.names import check_name
from redmux_server.registry.registry import AdapterRegistry


@pytest.fixture
def registry(open_registry):
    return open_registry()


async def test_a_put_adapter_is_found_by_name_and_by_digest(registry, adapters, files):
    published, changed = await registry.put("team/x", files[0], "", replace=False)
    assert changed
    assert published.read() == adapters[0]
    assert await registry.resolve("team/x") is published
    assert await registry.resolve(adapters[0].digest) is published
    assert len(registry) == 1


async def test_the_same_content_again_changes_nothing(registry, files):
    first, _ = await registry.put("x", files[0], "", replace=False)
    again, changed = await registry.put("x", files[0], "", replace=False)
    assert again is first
    assert not changed


async def test_the_same_vectors_with_other_metadata_are_published(registry, make_adapter):
    old, new = (
        to_bytes(make_adapter(0, metadata=AdapterMetadata(description=text)))
        for text in ("old", "new")
    )
    first, _ = await registry.put("x", old, "", replace=False)
    second, changed = await registry.put("x", new, "", replace=False)
    assert changed
    assert second.digest == first.digest
    assert await registry.resolve("x") is second
    assert await registry.resolve(first.digest) is second
    assert second.read().metadata.description == "new"
    assert first.read().metadata.description == "old"


async def test_other_content_is_refused_unless_it_may_replace(registry, adapters, files):
    await registry.put("x", files[0], "", replace=False)
    with pytest.raises(AlreadyExistsError, match=adapters[0].digest):
        await registry.put("x", files[1], "", replace=False)
    assert (await registry.resolve("x")).read() == adapters[0]
    published, changed = await registry.put("x", files[1], "", replace=True)
    assert changed
    assert await registry.resolve("x") is published
    assert published.read() == adapters[1]


async def test_what_was_resolved_before_a_replacement_stays_what_it_was(registry, adapters, files):
    await registry.put("x", files[0], "", replace=False)
    held = await registry.resolve("x")
    await registry.put("x", files[1], "", replace=True)
    assert held.read() == adapters[0]
    await registry.delete("x")
    assert held.read() == adapters[0]


async def test_a_replaced_digest_is_found_until_its_version_is_deleted(registry, adapters, files):
    await registry.put("x", files[0], "", replace=False)
    await registry.put("x", files[1], "", replace=True)
    assert (await registry.resolve(adapters[0].digest)).reference == "x@1"
    await registry.delete("x@1")
    with pytest.raises(NotFoundError):
        await registry.resolve(adapters[0].digest)


async def test_a_digest_is_found_while_any_name_has_it(registry, adapters, files):
    await registry.put("a", files[0], "", replace=False)
    await registry.put("b", files[0], "", replace=False)
    await registry.delete("a")
    assert (await registry.resolve(adapters[0].digest)).name == "b"


async def test_a_deleted_name_is_gone(registry, files):
    published, _ = await registry.put("x", files[0], "", replace=False)
    assert await registry.delete("x") is published
    with pytest.raises(NotFoundError):
        await registry.resolve("x")
    with pytest.raises(NotFoundError):
        await registry.delete("x")
    assert len(registry) == 0


async def test_an_unknown_name_gets_a_near_one_as_a_hint(registry, files):
    await registry.put("acme/summarize", files[0], "", replace=False)
    with pytest.raises(NotFoundError, match="'acme/summary'; did you mean 'acme/summarize'"):
        await registry.resolve("acme/summary")
    with pytest.raises(NotFoundError, match="no adapter 'zzz'; see ListAdapters"):
        await registry.resolve("zzz")


async def test_a_hint_costs_few_comparisons_however_many_names_there_are(
    registry, files, monkeypatch
):
    for number in range(400):
        await registry.put(f"tenant-{number:03d}", files[0], "", replace=False)
    asked = []

    def counting(word, known):
        asked.extend(known)
        return nearest(word, known)

    monkeypatch.setattr(registry_module, "nearest", counting)
    with pytest.raises(NotFoundError, match="did you mean 'tenant-200'"):
        await registry.resolve("tenant-200x")
    assert 0 < len(asked) <= 16


async def test_a_giant_name_is_cut_in_the_message(registry):
    with pytest.raises(NotFoundError) as caught:
        await registry.resolve("x" * 100_000)
    assert len(str(caught.value)) < 400


async def test_an_adapter_of_another_base_is_refused(registry, make_adapter):
    with pytest.raises(WrongBaseError, match="other-base"):
        await registry.put("x", to_bytes(make_adapter(0, "other-base")), "", replace=False)
    assert len(registry) == 0


async def test_another_base_is_named_before_its_sizes_are(registry, make_adapter, tmp_path):
    foreign = make_adapter(0, "tiny-64x2-0", sites={"model.layers.0.mlp.down_proj": 64})
    with pytest.raises(WrongBaseError, match="tiny-64x2-0"):
        await registry.put("x", to_bytes(foreign), "", replace=False)
    write_folder(foreign, tmp_path / "x")
    with pytest.raises(WrongBaseError, match="tiny-64x2-0"):
        registry.load(read_given((f"x={tmp_path / 'x'}",))[0])


async def test_an_adapter_of_a_relative_is_taken_where_other_bases_are_allowed(make_adapter):
    ours, theirs = "tiny-4x2-0123456789abcdef", "tiny-4x2-fedcba9876543210"
    other_size = ours.replace("4x2", "6x2")
    sites = make_adapter(0).sites
    data, foreign = (to_bytes(make_adapter(0, base)) for base in (theirs, other_size))
    strict = AdapterRegistry(ours, sites)
    with pytest.raises(WrongBaseError, match="--allow-other-base"):
        await strict.put("x", data, "", replace=False)
    registry = AdapterRegistry(ours, sites, allow_other_base=True)
    published, _ = await registry.put("x", data, "", replace=False)
    assert published.base_match == "other"
    assert (await registry.fetch(published)).base_fingerprint == theirs
    with pytest.raises(WrongBaseError, match="another architecture or size"):
        await registry.put("y", foreign, "", replace=False)


@pytest.mark.parametrize("sites", [{"model.layers.7.mlp.down_proj": 4},
                                   {"model.layers.0.mlp.down_proj": 5}])  # fmt: skip
async def test_edits_that_the_base_has_no_place_for_are_refused(sites, registry, make_adapter):
    with pytest.raises(InvalidAdapterError, match=r"down_proj"):
        await registry.put("x", to_bytes(make_adapter(0, sites=sites)), "", replace=False)
    assert len(registry) == 0


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"no adapter at all"])
async def test_bytes_that_are_no_adapter_are_refused(data, registry):
    with pytest.raises(InvalidAdapterError):
        await registry.put("x", data, "", replace=False)


async def test_a_file_larger_than_any_adapter_of_this_base_is_refused(registry):
    with pytest.raises(InvalidAdapterError, match="limit"):
        await registry.put("x", b"\0" * (registry.max_file_bytes + 1), "", replace=False)


async def test_the_largest_head_fits_where_heads_are_applied(
    open_registry, make_adapter, make_head
):
    file = to_bytes(make_adapter(0, head=make_head(400)))
    published, _ = await open_registry(head_size=400).put("a", file, "", replace=False)
    assert published.read().head.hidden_size == 400
    with pytest.raises(InvalidAdapterError, match="limit"):
        await open_registry().put("a", file, "", replace=False)


async def test_an_adapter_of_some_tokens_is_refused_where_all_are_edited(
    open_registry, make_adapter
):
    file = to_bytes(dataclasses.replace(make_adapter(0), apply="prompt"))
    with pytest.raises(FailedPreconditionError, match="edits 'prompt' alone, and this server's"):
        await open_registry(has_windows=False).put("a", file, "", replace=False)
    published, _ = await open_registry().put("a", file, "", replace=False)
    assert published.read().apply == "prompt"


async def test_a_head_is_refused_where_none_are_applied_and_one_that_is_kept_says_so(
    tmp_path, open_registry, make_adapter
):
    tensors = {"classifier.weight": torch.ones(2, 4), "classifier.bias": torch.ones(2)}
    head = Head(HeadConfig("mean", ["a", "b"], "single_label_classification"), tensors)
    file = to_bytes(make_adapter(0, sites={"model.layers.0.mlp.down_proj": 4}, head=head))
    with pytest.raises(FailedPreconditionError, match="head, which needs an encoder"):
        await open_registry().put("a", file, "", replace=False)
    await open_registry(tmp_path, head_size=4).put("a", file, "", replace=False)
    registry = open_registry(tmp_path)
    assert await registry.page("", 9) == []
    with pytest.raises(FailedPreconditionError, match=r"adapter 'a' cannot be used: .*head"):
        await registry.resolve("a")
    await registry.delete("a")


def test_an_adapter_that_edits_every_site_with_a_long_card_fits(registry, make_adapter):
    adapter = make_adapter(0)
    object.__setattr__(adapter, "metadata", AdapterMetadata(description="x" * 1000))
    assert len(to_bytes(adapter)) < registry.max_file_bytes


PART = "[a-z0-9][a-z0-9._-]{0,63}"


@given(
    st.from_regex(f"{PART}(/{PART})?", fullmatch=True).filter(lambda n: ".safetensors/" not in n)
)
def test_a_valid_name_is_a_path_inside_the_folder(tmp_path_factory, name):
    assert check_name(name) == name
    assert ".." not in name.split("/")
    assert not any(part.startswith(".") for part in name.split("/"))


@pytest.mark.parametrize(
    "name",
    [
        "", "A", "a b", "a/b/c", "/a", "a/", "a//b", ".a", "-a", "..", "../a", "a/../b", "a/.b",
        "a\n", "a\0", "é", "a\\b", "x" * 65, "a/" + "x" * 65, "sha256:" + "0" * 64, "\ud800",
        "x.safetensors/y",
    ],
)  # fmt: skip
async def test_what_is_no_name_is_refused(name, registry, files):
    with pytest.raises(InvalidArgumentError, match="name"):
        await registry.put(name, files[0], "", replace=False)


async def test_pages_are_sorted_and_add_up(registry, files):
    names = ["b", "a/z", "a", "c/1", "b-1"]
    for name in names:
        await registry.put(name, files[0], "", replace=False)
    pages, after = [], ""
    while page := await registry.page(after, 2):
        assert len(page) <= 2
        pages += [p.name for p in page]
        after = pages[-1]
    assert pages == sorted(names)


async def test_a_page_goes_on_after_a_name_that_was_deleted(registry, files):
    for name in "abcd":
        await registry.put(name, files[0], "", replace=False)
    await registry.delete("b")
    assert [p.name for p in await registry.page("b", 9)] == ["c", "d"]


async def test_of_concurrent_first_puts_one_wins_and_the_others_are_told(registry, files):
    puts = [registry.put("x", data, "", replace=False) for data in files]
    got = await asyncio.gather(*puts, return_exceptions=True)
    assert sum(isinstance(g, AlreadyExistsError) for g in got) == len(files) - 1
    winner = next(g[0] for g in got if isinstance(g, tuple))
    assert await registry.resolve("x") is winner


NAMES = st.sampled_from(["a", "b", "team/a", "team/b", "a.safetensors"])
ACTIONS = st.one_of(
    st.tuples(st.just("put"), NAMES, st.integers(0, 3), st.booleans()),
    st.tuples(st.just("delete"), NAMES),
    st.tuples(st.just("restart")),
)


@settings(max_examples=25, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=12))
def test_it_behaves_like_a_dict_that_survives_restarts(
    tmp_path_factory, actions, open_registry, adapters, files
):
    folder = tmp_path_factory.mktemp("adapters")

    async def play():
        model, registry = {}, open_registry(folder)
        for kind, *rest in actions:
            if kind == "restart":
                registry = open_registry(folder)
            elif kind == "put":
                name, index, replace = rest
                held = model.get(name)
                if held in (None, index) or replace:
                    published, changed = await registry.put(name, files[index], "", replace)
                    assert changed == (held != index)
                    assert published.digest == adapters[index].digest
                    model[name] = index
                else:
                    with pytest.raises(AlreadyExistsError):
                        await registry.put(name, files[index], "", replace)
            elif rest[0] in model:
                deleted = await registry.delete(rest[0])
                assert deleted.read() == adapters[model.pop(rest[0])]
            else:
                with pytest.raises(NotFoundError):
                    await registry.delete(rest[0])
            assert {p.name: p.digest for p in await registry.page("", 99)} == {
                name: adapters[index].digest for name, index in model.items()
            }

    asyncio.run(play())


@pytest.mark.parametrize("text", ["", "a\0b", "\ud800", "é", "x" * 70_000, "a@", "a@b c", "@3"])
async def test_what_nothing_can_be_called_is_not_found(text, open_kept):
    registry = open_kept()
    with pytest.raises(NotFoundError, match="no adapter"):
        await registry.resolve(text)
    with pytest.raises(NotFoundError, match="no adapter"):
        await registry.delete(text)
