"""Lines of batches as requests of the application."""

import json

import pytest

from redmux_server.http_api.batch_lines import line_answerer


class App:
    """Answers with what it was asked, or as it is told."""

    def __init__(self, status=200, headers=(), error=None, tells=True):
        self.status, self.headers, self.error, self.tells = status, list(headers), error, tells

    async def __call__(self, scope, receive, send):
        self.scope = scope
        body = (await receive())["body"]
        self.asked = json.loads(body)
        if self.tells:
            await send({"type": "http.response.start", "status": self.status,
                        "headers": self.headers})  # fmt: skip
            await send({"type": "http.response.body", "body": body[:1], "more_body": True})
            await send({"type": "http.response.body", "body": body[1:]})
        if self.error is not None:
            raise self.error


async def ask(app, body, endpoint="/v1/completions"):
    return await line_answerer(app)(endpoint, body, "key-1", "batch_req_1")


BODIES = [
    b"{}", b' { } ', b'{"a": {"b": "}"}}', b'{"priority": -5, "seed": 123456789012345678901234}',
    b'{"x": 1.10}',
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
async def test_a_line_is_behind_every_other_request_and_else_as_it_was_written(body):
    app = App()
    reply = await ask(app, body)
    assert app.asked == json.loads(body) | {"priority": 100}
    assert (reply.status, json.loads(reply.body), reply.retry_after_s) == (200, app.asked, None)
    assert app.scope["path"] == "/v1/completions"
    assert app.scope["caller"].tenant == "key-1"
    assert app.scope["caller"].request_id == "batch_req_1"


async def test_what_says_when_to_try_again_is_tried_again():
    reply = await ask(App(429, [(b"retry-after-ms", b"1500")]), b"{}")
    assert (reply.status, reply.retry_after_s) == (429, 1.5)
    assert (await ask(App(429, [(b"x-should-retry", b"false")]), b"{}")).retry_after_s is None


async def test_an_error_that_was_answered_is_the_answer_and_another_is_raised():
    assert (await ask(App(500, error=RuntimeError("x")), b"{}")).status == 500
    with pytest.raises(RuntimeError, match="x"):
        await ask(App(error=RuntimeError("x"), tells=False), b"{}")
