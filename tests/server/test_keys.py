"""API keys from a file, and what no key may be."""

import pytest

from redmux.errors import InvalidArgumentError
from redmux_server.config import ServerConfig
from redmux_server.keys import read_keys


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
