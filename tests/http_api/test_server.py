"""HTTP of a whole server: its keys and owners, its folders, its start and its end."""

import asyncio
import contextlib

import httpx2
import openai
import pytest

from redmux import AsyncClient
from redmux_adapters import to_bytes, write_folder
from redmux_server.metrics_port import State

KEYS = {"api_keys": ("first-key", "other-key"), "admin_key": "admin-key"}


@pytest.fixture
async def start(start_server):
    """Starts servers of this test's own loop; returns a server, and plain clients by key."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**options):
            server = await start_server(served_model_name=("tiny",), **options)

            async def client(key=None):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                url = f"http://127.0.0.1:{server.http_port}"
                return await stack.enter_async_context(
                    httpx2.AsyncClient(base_url=url, headers=headers, timeout=60)
                )

            return server, client

        yield start


async def test_what_is_anothers_is_not_there_over_http_either(start, base):
    server, client = await start(**KEYS)
    one, other, boss, nobody = [
        await client(key) for key in ("first-key", "other-key", "admin-key", None)
    ]
    data = to_bytes(base.adapter(1))
    assert (await one.put("/v1/adapters/mine", content=data)).status_code == 201
    assert (await boss.put("/v1/adapters/shared", content=to_bytes(base.adapter(2)))).is_success
    for path in ("/v1/models", "/v1/adapters"):
        for who, names in ((one, {"mine", "shared"}), (other, {"shared"}),
                           (boss, {"mine", "shared"})):  # fmt: skip
            listed = {m["id"] for m in (await who.get(path)).json()["data"]} - {"tiny"}
            assert listed == names
    asked = {
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
        "/v1/responses": {"input": "a"},
        "/v1/embeddings": {"input": "a"},
        "/classify": {"input": "a"},
        "/pooling": {"input": "a"},
        "/score": {"text_1": "a", "text_2": "b"},
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [1]},
    }
    for name in ("mine", base.adapter(1).digest):
        for path, body in asked.items():
            response = await other.post(path, json={"model": name, **body})
            assert response.status_code == 404, path
            assert "mine" not in response.text.replace(repr(name), "")
        assert (await other.get(f"/v1/models/{name}")).status_code == 404
        assert (await other.get(f"/v1/adapters/{name}")).status_code == 404
    assert (await other.delete("/v1/adapters/mine")).status_code == 404
    unload = await other.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
    assert unload.status_code == 404
    assert (await other.put("/v1/adapters/mine", content=data)).status_code == 409
    assert (await other.delete("/v1/adapters/shared")).status_code == 403
    file = {"accept": "application/octet-stream"}
    assert (await other.get("/v1/adapters/shared", headers=file)).status_code == 403
    assert (await boss.get("/v1/adapters/mine", headers=file)).content
    for path in (*asked, "/v1/models", "/v1/adapters", "/v1/nowhere"):
        assert (await nobody.post(path, json={})).status_code == 401, path
    metrics = (await nobody.get("/metrics")).text
    assert "mine" not in metrics
    with pytest.raises(openai.AuthenticationError):
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{server.http_port}/v1", api_key="wrong", max_retries=0
        ) as api:
            await api.models.list()


async def test_the_gateway_is_not_told_of_tenants_adapters(start, base):
    server, client = await start(**KEYS)
    one = await client("first-key")
    await one.put("/v1/adapters/mine", content=to_bytes(base.adapter(1)))
    body = {"model": "mine", "prompt": "a", "max_tokens": 200, "ignore_eos": True}
    asking = asyncio.create_task(one.post("/v1/completions", json=body))
    while not server.engine.open_digests()[0]:
        await asyncio.sleep(0.001)
    assert 'running_lora_adapters=""' in (await one.get("/metrics")).text
    asking.cancel()


async def test_adapters_are_loaded_by_their_paths_from_allowed_folders_alone(start, base, tmp_path):
    allowed = tmp_path / "allowed"
    write_folder(base.adapter(1), allowed / "one")
    (allowed / "two.safetensors").write_bytes(to_bytes(base.adapter(2)))
    write_folder(base.adapter(3), tmp_path / "outside")
    (allowed / "link").symlink_to(tmp_path / "outside")
    _, client = await start(load_dir=str(allowed))
    http = await client()

    async def load(path, name="x", prefix="/v1", **more):
        body = {"lora_name": name, "lora_path": str(path), **more}
        return await http.post(f"{prefix}/load_lora_adapter", json=body)

    done = await load(allowed / "one")
    assert done.text == "Success: LoRA adapter 'x' added successfully."
    assert (await load("two.safetensors")).status_code == 409
    assert (await load("two.safetensors", load_inplace=True)).status_code == 200
    assert (await http.get("/v1/models/x")).json()["root"] == base.adapter(2).digest
    as_sglang = await load("one", "y", "", pinned=True)
    assert as_sglang.json()["success"] is True
    assert as_sglang.json()["loaded_adapters"]["y"] == base.adapter(1).digest
    for path, status in (
        (tmp_path / "outside", 403), ("../outside", 403), ("link", 403), ("/etc/passwd", 403),
        ("nowhere", 404), ("a\0b", 400), ("a" * 5000, 400), (allowed, 400),
    ):  # fmt: skip
        response = await load(path, "z")
        assert response.status_code == status, (path, response.text)
    for prefix, name in (("/v1", "x"), ("", "y")):
        response = await http.post(f"{prefix}/unload_lora_adapter", json={"lora_name": name})
        assert response.status_code == 200
        assert (await http.get(f"/v1/models/{name}")).status_code == 404
    response = await http.post("/v1/unload_lora_adapter", json={"lora_name": "x"})
    assert response.status_code == 404


async def test_paths_are_the_operators_and_nothing_is_loaded_where_no_folder_is_allowed(
    start, base, tmp_path
):
    write_folder(base.adapter(1), tmp_path / "one")
    body = {"lora_name": "x", "lora_path": "one"}
    _, client = await start(**KEYS, load_dir=str(tmp_path))
    tenant, boss = await client("first-key"), await client("admin-key")
    assert (await tenant.post("/v1/load_lora_adapter", json=body)).status_code == 403
    assert (await boss.post("/v1/load_lora_adapter", json=body)).status_code == 200
    _, client = await start()
    response = await (await client()).post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 403
    assert "--load-dir" in response.json()["error"]["message"]


async def test_a_server_that_drains_ends_what_runs_and_takes_nothing_new(start):
    server, client = await start()
    http = await client()
    body = {"model": "tiny", "prompt": "a", "max_tokens": 60, "ignore_eos": True}
    running = asyncio.create_task(http.post("/v1/completions", json=body))
    while not server.engine.num_open:
        await asyncio.sleep(0.001)
    stopping = asyncio.create_task(server.stop(drain_s=60))
    while server.state is not State.DRAINING:
        await asyncio.sleep(0.001)
    refused = await http.post("/v1/completions", json=body)
    if not stopping.done():
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
    assert (await running).json()["usage"]["completion_tokens"] == 60
    await stopping


async def test_both_doors_share_what_a_caller_may_hold(start):
    server, client = await start(api_keys=("first-key",))
    http = await client("first-key")
    in_flight = server.doors.http._gate._in_flight
    assert server.doors.grpc._interceptor._in_flight is in_flight
    assert (await http.get("/v1/models")).status_code == 200
    assert in_flight.num_bytes == 0
    async with AsyncClient(f"127.0.0.1:{server.port}", api_key="first-key") as there:
        await there.info()
