"""/v1/files as the openai package asks for them, and as nobody should."""

import openai
import pytest

from redmux_server.files.store import MAX_FILE_BYTES

LINES = b'{"prompt": "a", "completion": "b"}\n'


async def test_a_file_is_sent_listed_read_and_deleted(api):
    file = await api.files.create(file=("ünï.jsonl", LINES), purpose="fine-tune")
    assert file.id.startswith("file-")
    assert (file.filename, file.bytes, file.purpose) == ("ünï.jsonl", len(LINES), "fine-tune")
    assert file.status == "processed"
    assert await api.files.retrieve(file.id) == file
    assert (await api.files.content(file.id)).content == LINES
    assert file.id in [f.id async for f in api.files.list(purpose="fine-tune")]
    assert file.id not in [f.id async for f in api.files.list(purpose="batch")]
    deleted = await api.files.delete(file.id)
    assert deleted.deleted
    for ask in (api.files.retrieve, api.files.content, api.files.delete):
        with pytest.raises(openai.NotFoundError, match=file.id):
            await ask(file.id)


async def test_lists_come_in_pages_in_either_order(api):
    files = [await api.files.create(file=(f"{i}.jsonl", LINES), purpose="batch") for i in range(5)]
    ids = [file.id for file in files]
    newest = [f.id async for f in api.files.list(purpose="batch", limit=2)]
    assert newest == ids[::-1]
    assert [f.id async for f in api.files.list(purpose="batch", order="asc", limit=3)] == ids
    page = await api.files.list(purpose="batch", limit=2, after=ids[3])
    assert ([f.id for f in page.data], page.has_more) == ([ids[2], ids[1]], True)
    with pytest.raises(openai.BadRequestError, match="after is 'file-none'"):
        await api.files.list(after="file-none")
    with pytest.raises(openai.BadRequestError, match="limit"):
        await api.files.list(limit=0)


async def test_a_large_file_comes_back_as_it_was(api):
    data = (b"x" * 1023 + b"\n") * 5000
    file = await api.files.create(file=("large.jsonl", data), purpose="batch")
    assert (await api.files.content(file.id)).content == data
    await api.files.delete(file.id)


async def test_a_file_that_is_too_large_is_refused_with_the_limit(http):
    form = {"files": {"file": ("a", b"x" * (MAX_FILE_BYTES + 1))}, "data": {"purpose": "batch"}}
    refused = await http.post("/v1/files", **form)
    assert refused.status_code == 400
    assert str(MAX_FILE_BYTES) in refused.json()["error"]["message"]
    form["files"]["file"] = ("a", b"x" * (MAX_FILE_BYTES + (1 << 17)))
    assert (await http.post("/v1/files", **form)).status_code == 413


FILE = {"file": ("a.jsonl", LINES)}
REFUSED = {
    "no purpose": (FILE, {}, "purpose", "purpose is missing"),
    "another purpose": (FILE, {"purpose": "vision"}, "purpose", "'vision', must be one of"),
    "one of ours": (FILE, {"purpose": "batch_output"}, "purpose", "must be one of fine-tune"),
    "no file": ({"other": LINES}, {"purpose": "batch"}, "other", "other is not served"),
    "a field": ({}, {"purpose": "batch", "file": "x"}, None, "must be multipart"),
    "an end": (FILE, {"purpose": "batch", "expires_after[seconds]": "3600"},
               "expires_after[seconds]", "files stay until they are deleted"),
    "empty": ({"file": ("a", b"")}, {"purpose": "batch"}, None, "the file is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
async def test_what_is_no_file_to_keep_is_refused(http, case):
    files, data, param, message = REFUSED[case]
    refused = await http.post("/v1/files", files=files, data=data)
    assert 400 <= refused.status_code < 500
    error = refused.json()["error"]
    assert message in error["message"]
    assert error["param"] == param


def form(*parts, end=b"--b--\r\n"):
    return b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + end


PURPOSE = b'Content-Disposition: form-data; name="purpose"\r\n\r\nbatch'
CONTENT = b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n{}\n'
MALFORMED = {
    "cut off": form(PURPOSE, CONTENT, end=b""),
    "another boundary": b"--c\r\n\r\n--c--\r\n",
    "nothing": b"",
    "no form": b"{}",
    "a part without a name": form(PURPOSE, b"X: y\r\n\r\nz"),
    "a field twice": form(PURPOSE, PURPOSE, CONTENT),
    "many fields": form(*(PURPOSE.replace(b"purpose", b"p%d" % i) for i in range(20))),
    "a header that is none": form(b"\x00\xff\r\n\r\nz"),
}


@pytest.mark.parametrize("case", MALFORMED)
async def test_a_malformed_form_is_told_its_sender_alone(http, case, caplog):
    headers = {"content-type": "multipart/form-data; boundary=b"}
    refused = await http.post("/v1/files", content=MALFORMED[case], headers=headers)
    assert refused.status_code == 400, refused.text
    assert "the body is no form" in refused.json()["error"]["message"]
    assert caplog.records == []


async def test_a_form_is_called_one(http):
    for kind in ("application/json", "multipart/form-data", "text/plain; boundary=b", ""):
        headers = {"content-type": kind}
        refused = await http.post("/v1/files", content=form(PURPOSE, CONTENT), headers=headers)
        assert refused.status_code in (400, 415), kind


async def test_pages_of_other_origins_send_no_files(http, url):
    for origin, status in (("https://evil.example", 403), ("null", 403), (url, 200)):
        sent = await http.post(
            "/v1/files", files=FILE, data={"purpose": "batch"}, headers={"origin": origin}
        )
        assert sent.status_code == status, sent.text
