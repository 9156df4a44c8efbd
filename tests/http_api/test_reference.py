"""The page at /docs, which is made of the document."""

import httpx2

from redmux_server.http_api.reference import written


async def test_the_page_of_calls_needs_no_key_and_nothing_from_elsewhere(start_server):
    server = await start_server(api_keys=("a-key-of-this-test",))
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}") as http:
        page = await http.get("/docs")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "http:" not in page.text
        assert "https:" not in page.text
        assert "<script" not in page.text
        head = await http.head("/docs")
        assert (head.status_code, head.content) == (200, b"")
        assert (await http.get("/page/reference.css")).status_code == 200
        assert (await http.get("/docs/oauth2-redirect")).status_code == 401  # as any other path


def test_what_the_document_says_is_text():
    evil = "<script>'\"&"
    told = {"description": evil, "type": evil, "enum": [evil]}
    page = written({
        "info": {"title": evil, "version": evil, "description": evil},
        "paths": {f"/{evil}": {"get": {
            "tags": [evil], "description": f"{evil}\n{evil}",
            "parameters": [{"name": evil, "schema": told}, {"name": "x", "schema": {"type": evil}}],
            "requestBody": {"content": {evil: {"schema": {"properties": {evil: told}}}}},
            "responses": {"200": {"content": {evil: {"schema": {"const": evil}}}}},
        }}},
        "components": {"schemas": {evil: {"properties": {evil: {"$ref": f"#/{evil}"}}}}},
    })  # fmt: skip
    assert "<script" not in page
    assert "&lt;script&gt;" in page
