"""Adapters of one API key, seen by another through every method of the API."""

import pytest
from encoders import load_tiny_encoder, save_tiny_encoder

import redmux
from redmux import AsyncClient
from redmux.v1 import (
    adapter_service_pb2,
    admin_service_pb2,
    inference_service_pb2,
    training_service_pb2,
)
from redmux_adapters import to_bytes, write_folder

KEYS = {"api_keys": ("one", "two"), "admin_key": "boss"}
RECORDS = [{"prompt": "Yes?", "completion": "no"}]


async def streamed(call):
    return [chunk async for chunk in call]


# What each method that takes the name of an adapter is asked.
ASKED = {
    "InferenceService.Generate": lambda c, name: streamed(c.stream("abc", adapter=name)),
    "InferenceService.Complete": lambda c, name: c.generate("abc", adapter=name, max_tokens=2),
    "InferenceService.Score": lambda c, name: c.score("abc", ["d"], adapter=name),
    "InferenceService.Tokenize": lambda c, name: c.tokenize("abc", adapter=name),
    "InferenceService.Embed": lambda c, name: c.embed(["abc"], adapter=name),
    "InferenceService.Classify": lambda c, name: c.classify(["abc"], adapter=name),
    "AdapterService.GetAdapter": lambda c, name: c.adapters.get(name),
    "AdapterService.DeleteAdapter": lambda c, name: c.adapters.delete(name),
    "AdapterService.DownloadAdapter": lambda c, name: c.adapters.download(name),
}
# Those that have tests of their own here, or in the tests of training and of the registry.
OTHERS = {
    "InferenceService.Detokenize",  # which takes none
    "AdapterService.PutAdapter", "AdapterService.ListAdapters", "AdapterService.SetAlias",
    "AdapterService.DeleteAlias", "AdminService.GetServerInfo",
    "TrainingService.CreateJob", "TrainingService.GetJob", "TrainingService.ListJobs",
    "TrainingService.WatchJob", "TrainingService.CancelJob",
}  # fmt: skip


def test_every_method_has_its_test():
    modules = (adapter_service_pb2, admin_service_pb2, inference_service_pb2, training_service_pb2)
    services = [s for m in modules for s in m.DESCRIPTOR.services_by_name.values()]
    assert {f"{s.name}.{m.name}" for s in services for m in s.methods} == {*ASKED, *OTHERS}


@pytest.fixture
async def clients(start_server, base, tmp_path):
    """Clients of each key, after "one" and the admin have put an adapter; a server restarts."""
    write_folder(base.adapter(3), tmp_path / "given")
    options = KEYS | {
        "data_dir": str(tmp_path / "kept"), "adapters": (str(tmp_path / "given"),)
    }  # fmt: skip
    server = await start_server(**options)
    async with AsyncClient(f"127.0.0.1:{server.port}", api_key="one") as one:
        await one.adapters.put("mine/secret", to_bytes(base.adapter(1)))
    async with AsyncClient(f"127.0.0.1:{server.port}", api_key="boss") as boss:
        await boss.adapters.put("shared", to_bytes(base.adapter(2)))
    await server.stop(drain_s=0)
    server = await start_server(**options)
    target = f"127.0.0.1:{server.port}"
    async with (
        AsyncClient(target, api_key="one") as one,
        AsyncClient(target, api_key="two") as two,
        AsyncClient(target, api_key="boss") as boss,
    ):
        yield {"one": one, "two": two, "boss": boss}


async def test_no_method_tells_or_changes_anything_of_another_keys_adapter(clients, base):
    two = clients["two"]
    for method, ask in ASKED.items():
        for name in ("mine/secret", base.adapter(1).digest, "mine/secrets"):
            error = redmux.NotFoundError
            if method == "InferenceService.Classify":  # this model has none, whoever asks
                error = redmux.FailedPreconditionError
            with pytest.raises(error) as caught:
                await ask(two, name)
            assert "did you mean" not in str(caught.value)
    for name in ("mine/secret", "mine/secrets"):
        for ask in (two.adapters.set_alias(name, "a", 1), two.adapters.delete_alias(name, "a")):
            with pytest.raises(redmux.NotFoundError):
                await ask
        with pytest.raises(redmux.NotFoundError):
            [version async for version in two.adapters.list(name)]
    with pytest.raises(redmux.NotFoundError):
        await two.adapters.put("mine/secret", to_bytes(base.adapter(4)), replace=True)
    with pytest.raises(redmux.AlreadyExistsError):
        await two.adapters.put("mine/secret", to_bytes(base.adapter(1)))
    for replace, error in {True: redmux.NotFoundError, False: redmux.AlreadyExistsError}.items():
        with pytest.raises(error, match="mine/secret"):
            await two.jobs.create([redmux.TrainingTask("mine/secret", RECORDS)], replace=replace)
    assert [a.name async for a in two.adapters.list()] == ["given", "shared"]
    assert (await clients["one"].adapters.get("mine/secret")).digest == base.adapter(1).digest


async def test_the_operators_adapters_can_be_used_and_not_changed(clients, base):
    two = clients["two"]
    for name, seed in {"given": 3, "shared": 2}.items():
        got = await two.generate("abc", adapter=name, max_tokens=2)
        assert got.digest == base.adapter(seed).digest
        with pytest.raises(redmux.PermissionDeniedError):
            await two.adapters.delete(name)
        with pytest.raises(redmux.PermissionDeniedError):
            await two.adapters.download(name)
        with pytest.raises(redmux.PermissionDeniedError):
            await two.adapters.put(name, to_bytes(base.adapter(4)), replace=True)
        with pytest.raises(redmux.PermissionDeniedError):
            await two.jobs.create([redmux.TrainingTask(name, RECORDS)], replace=True)


async def test_the_servers_information_tells_a_key_no_more_than_it_may_know(clients, tiny_folder):
    seen = {key: await client.info() for key, client in clients.items()}
    assert {key: info.num_adapters for key, info in seen.items()} == {"one": 3, "two": 2, "boss": 3}
    assert seen["boss"].model == str(tiny_folder)
    assert seen["one"].model == seen["two"].model == tiny_folder.name


async def test_an_owner_and_the_admin_do_what_they_like(clients, base):
    for key, seed in {"one": 4, "boss": 5}.items():
        client = clients[key]
        await client.adapters.put("mine/secret", to_bytes(base.adapter(seed)), replace=True)
        assert "mine/secret" in [a.name async for a in client.adapters.list()]
        got = await clients["one"].generate("abc", adapter="mine/secret", max_tokens=2)
        assert got.digest == base.adapter(seed).digest
        with pytest.raises(redmux.NotFoundError):
            await clients["two"].adapters.get("mine/secret")
    await clients["boss"].adapters.delete("mine/secret")
    await clients["boss"].adapters.delete("shared")
    assert [a.name async for a in clients["one"].adapters.list()] == ["given"]


async def test_without_keys_everybody_may_do_everything(start_server, base, tmp_path):
    options = {"data_dir": str(tmp_path)}
    server = await start_server(**options, **KEYS)
    async with AsyncClient(f"127.0.0.1:{server.port}", api_key="one") as one:
        await one.adapters.put("x", to_bytes(base.adapter(1)))
    await server.stop(drain_s=0)
    server = await start_server(**options)
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        assert (await client.adapters.get("x")).digest == base.adapter(1).digest
        await client.adapters.put("x", to_bytes(base.adapter(2)), replace=True)
    await server.stop(drain_s=0)
    server = await start_server(**options, **KEYS)
    target = f"127.0.0.1:{server.port}"
    async with AsyncClient(target, api_key="one") as one, AsyncClient(target, api_key="two") as two:
        assert (await one.adapters.get("x")).digest == base.adapter(2).digest
        with pytest.raises(redmux.NotFoundError):
            await two.adapters.get("x")
    for path in tmp_path.glob("registry.db*"):
        assert b"one" not in path.read_bytes().split()


async def test_classifying_with_another_keys_adapter_is_refused(start_server, tmp_path):
    encoder = load_tiny_encoder(save_tiny_encoder(tmp_path, "bert"))
    server = await start_server(model=str(encoder.folder), threads=1, **KEYS)
    target = f"127.0.0.1:{server.port}"
    async with AsyncClient(target, api_key="one") as one, AsyncClient(target, api_key="two") as two:
        adapter = encoder.adapter(1, "bert")
        await one.adapters.put("x", to_bytes(adapter))
        assert (await one.classify(["abc"], adapter="x")).digest == adapter.digest
        for name in ("x", adapter.digest):
            with pytest.raises(redmux.NotFoundError):
                await two.classify(["abc"], adapter=name)
            with pytest.raises(redmux.NotFoundError):
                await two.embed(["abc"], adapter=name)
