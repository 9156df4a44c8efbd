"""What docs/http.md promises; its code is run by tests/test_documents.py."""

from pathlib import Path

from redmux_server.http_api.schemas import chat, completion, response

DOCUMENT = (Path(__file__).parents[2] / "docs" / "http.md").read_text()


def test_every_field_is_in_the_document():
    for model in (completion.CompletionBody, chat.ChatBody, response.ResponseBody):
        for name in sorted(model.no_effect):
            assert f"`{name}`" in DOCUMENT, name
    for model in (completion.CompletionBody, chat.ChatBody):
        for name in sorted(set(model.model_fields) - {"prompt", "messages", "model"}):
            assert f"`{name}`" in DOCUMENT, name
