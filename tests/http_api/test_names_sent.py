"""Errors name the fields that a client has sent, not what services call them."""

import pytest

CHAT = [{"role": "user", "content": "a"}]
COMPLETIONS, CHATS, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
CASES = [
    (COMPLETIONS, {"max_tokens": -1}, "max_tokens"),
    (COMPLETIONS, {"guided_json": {"type": 5}}, "guided_json"),
    (COMPLETIONS, {"guided_regex": "("}, "guided_regex"),
    (COMPLETIONS, {"guided_choice": []}, "guided_choice"),
    (COMPLETIONS, {"guided_grammar": "start: nothing"}, "guided_grammar"),
    (COMPLETIONS, {"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    (COMPLETIONS, {"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
    (COMPLETIONS, {"prompt": [999999]}, "prompt"),
    (CHATS, {"max_completion_tokens": -1}, "max_completion_tokens"),
    (CHATS, {"max_tokens": -1}, "max_tokens"),
    (CHATS, {"response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": {"type": 5}}}}, "response_format"),
    (CHATS, {"messages": [{"role": "nobody", "content": "a"}]}, "messages"),
    (RESPONSES, {"max_output_tokens": -1}, "max_output_tokens"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 5}}}},
     "text.format"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "name"), CASES, ids=lambda value: str(value)[:40])
async def test_an_error_names_the_field_that_was_sent(http, path, fields, name):
    needed = {COMPLETIONS: {"prompt": "a"}, CHATS: {"messages": CHAT}, RESPONSES: {"input": "a"}}
    answer = await http.post(path, json={"model": "tiny", **needed[path], **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert name in error["message"]
    assert (error["param"] or name).startswith(name)
    for other in {"max_tokens", "the JSON schema", "no_repeat_ngram "} - {name}:
        assert other not in error["message"].replace(name, ""), error["message"]
