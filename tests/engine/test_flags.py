"""What the command line tells and takes, beyond the values themselves."""

import dataclasses

import pytest

from redmux_server.config import ServerConfig, load_config


@pytest.mark.parametrize("argv", [["--max-q", "1"], ["--api-key", "secret"]])
def test_a_shortened_flag_is_unknown(argv, capsys):
    """It would change its meaning with the first new option that shares its beginning."""
    with pytest.raises(SystemExit) as caught:
        load_config(argv, {})
    assert caught.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_help_tells_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"], {})
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(ServerConfig):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        value = f"[{field.name.upper()}]" if isinstance(default, bool) else field.name.upper()
        assert f"{flag} {value} {field.metadata['help']}" in text
        shown = "none" if default in ("", ()) else default
        if isinstance(default, bool):
            shown = str(default).lower()  # as it must be written
        assert f"default: {shown}" in text.partition(f"{flag} {value} ")[2]
    assert "0 takes every core; default: 0" in text
