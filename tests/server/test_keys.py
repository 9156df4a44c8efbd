"""API keys from a file, and what no key may be."""

import pytest

from redmux.errors import InvalidArgumentError, UnauthenticatedError
from redmux_server.config import ServerConfig
from redmux_server.keys import ADMIN, ApiKeys, read_keys


@pytest.fixture
def keys_of(tmp_path):
    def keys_of(text, **options):
        path = tmp_path / "keys"
        path.write_bytes(text)
        return read_keys(ServerConfig(api_keys_file=str(path), **options))

    return keys_of


def test_a_file_holds_a_key_a_line_beside_those_of_the_configuration(keys_of):
    text = b"# team a\nfirst-key\n\n  second-key  \r\n# none-of-these\n"
    assert keys_of(text, api_keys=("own-long-key",)) == ("own-long-key", "first-key", "second-key")


def test_keys_without_a_file_are_those_of_the_configuration():
    assert read_keys(ServerConfig(api_keys=("own-long-key",))) == ("own-long-key",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "holds no key"),
        (b"# nothing\n \n", "holds no key"),
        (b"first-key\nsecret", "key 2 of .*keys has 6 characters"),
        (b"first key of two", "key 1 of"),
        (b"\xff\xfe\x00", "cannot read api_keys_file"),
    ],
    ids=str,
)
def test_a_file_that_guards_nothing_is_refused(keys_of, text, message):
    with pytest.raises(InvalidArgumentError, match=message):
        keys_of(text, api_keys=("own-long-key",))


def test_a_file_that_is_not_there_is_refused_by_name():
    with pytest.raises(InvalidArgumentError, match="cannot read api_keys_file /nowhere"):
        read_keys(ServerConfig(api_keys_file="/nowhere"))


@pytest.mark.parametrize("text", ["Bearer one", "bearer one", "BEARER two"])
def test_a_known_key_is_let_in(text):
    assert ApiKeys(["one", "two"]).tenant(text).startswith("key-")


@pytest.mark.parametrize(
    "text", ["", "one", "Bearer", "Bearer ", "Bearer on", "Bearer one ", "Bearer ONE", "Basic one"]
)
def test_anything_else_is_refused(text):
    with pytest.raises(UnauthenticatedError, match="missing or unknown API key"):
        ApiKeys(["one", "two"]).tenant(text)


def test_without_keys_everybody_is_one_tenant():
    assert {ApiKeys([]).tenant(c) for c in ("", "Bearer x")} == {""}


def test_each_key_is_a_tenant_whose_name_does_not_show_it():
    keys = ApiKeys(["secret-one", "secret-two"])
    names = [keys.tenant(f"Bearer secret-{n}") for n in ("one", "two", "one")]
    assert names[0] == names[2] != names[1]
    assert not any("secret" in name for name in names)


def test_the_admin_key_is_let_in_as_the_admin():
    keys = ApiKeys(["one"], "boss")
    assert keys.tenant("Bearer boss") == ADMIN
    assert keys.tenant("Bearer one").startswith("key-")
    alone = ApiKeys([], "boss")
    assert alone.tenant("Bearer boss") == ADMIN
    for text in ("", "Bearer ", "Bearer one"):
        with pytest.raises(UnauthenticatedError):
            alone.tenant(text)


def test_a_key_has_the_same_name_in_every_run_whatever_the_other_keys():
    """Adapters on disk carry it; this value must not change."""
    expected = "key-cb1f81636632ca0a91bd9551aaa4df71"
    for keys in (["one"], ["two", "one"]):
        assert ApiKeys(keys, "boss").tenant("Bearer one") == expected
