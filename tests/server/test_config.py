"""Flags, environment and file fill one frozen configuration."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redmux.errors import InvalidArgumentError
from redmux_server.config import ServerConfig, load_config


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "redmux.toml"
        path.write_text(text)
        return str(path)

    return write


def test_the_defaults_are_complete_and_valid():
    assert load_config([], {}) == ServerConfig()


def test_a_flag_wins_over_the_environment_and_that_over_the_file(write):
    path = write("port = 1\nthreads = 1\nmax_queue = 1")
    config = load_config(
        ["--config", path, "--port", "3"], {"REDMUX_PORT": "2", "REDMUX_THREADS": "2"}
    )
    assert (config.port, config.threads, config.max_queue) == (3, 2, 1)


def test_the_file_can_be_named_by_the_environment_and_the_flag_wins(write, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text("port = 7")
    environ = {"REDMUX_CONFIG": write("port = 6")}
    assert load_config([], environ).port == 6
    assert load_config(["--config", str(other)], environ).port == 7


@pytest.mark.parametrize("field", dataclasses.fields(ServerConfig), ids=lambda f: f.name)
def test_every_field_can_be_set_in_each_of_the_three_places(field, write):
    extra = {"tls_cert": {"tls_key": "k"}, "tls_key": {"tls_cert": "c"}}.get(field.name, {})
    choices = {
        "device": "cpu", "dtype": "float32", "quantization": "int8", "kv_dtype": "bfloat16",
        "drafts": "off", "log_level": "debug", "host": "::1", "admin_key": "a-long-key",
    }  # fmt: skip
    if isinstance(field.default, tuple):
        text = "a-long-key"
        value, toml = (text,), f'["{text}"]'
    elif isinstance(field.default, str):
        value = text = choices.get(field.name, "x")
        toml = f'"{text}"'
    elif isinstance(field.default, bool):
        value = not field.default
        text = toml = str(value).lower()
    else:
        value = {"training_share": 0.5}.get(field.name, type(field.default)(77))
        text = toml = str(value)
    flags = [f"--{name.replace('_', '-')}={v}" for name, v in extra.items()]
    by_flag = load_config([f"--{field.name.replace('_', '-')}", text, *flags], {})
    by_environment = load_config(flags, {f"REDMUX_{field.name.upper()}": text})
    by_file = load_config([*flags, "--config", write(f"{field.name} = {toml}")], {})
    assert getattr(by_flag, field.name) == value
    assert by_flag == by_environment == by_file


def test_a_list_is_a_repeated_flag_a_comma_list_or_an_array(write):
    expected = ("one=a", "b c")
    by_flag = load_config(["--adapters", "one=a", "--adapters", "b c"], {})
    by_environment = load_config([], {"REDMUX_ADAPTERS": "one=a, b c,"})
    by_file = load_config(["--config", write('adapters = ["one=a", "b c"]')], {})
    assert by_flag.adapters == by_environment.adapters == by_file.adapters == expected


def test_a_list_flag_replaces_the_list_of_the_environment():
    config = load_config(["--api-keys", "mine-alone"], {"REDMUX_API_KEYS": "first-one,second-one"})
    assert config.api_keys == ("mine-alone",)


def test_an_empty_list_variable_is_no_entry():
    assert load_config([], {"REDMUX_ADAPTERS": " , "}).adapters == ()


def test_variables_of_the_client_and_of_others_are_left_alone():
    environ = {"REDMUX_TARGET": "x", "REDMUX_CACHE": "x", "PATH": "x"}
    assert load_config([], environ) == ServerConfig()


# What Kubernetes puts into every pod beside Services called redmux and redmux-metrics.
SERVICE_LINKS = {
    "REDMUX_SERVICE_HOST": "10.0.0.7",
    "REDMUX_SERVICE_PORT": "50051",
    "REDMUX_SERVICE_PORT_GRPC_WEB": "50051",
    "REDMUX_PORT": "tcp://10.0.0.7:50051",
    "REDMUX_PORT_50051_TCP": "tcp://10.0.0.7:50051",
    "REDMUX_PORT_50051_TCP_PROTO": "tcp",
    "REDMUX_PORT_50051_TCP_PORT": "50051",
    "REDMUX_PORT_50051_TCP_ADDR": "10.0.0.7",
    "REDMUX_METRICS_SERVICE_HOST": "10.0.0.8",
    "REDMUX_METRICS_SERVICE_PORT": "9095",
    "REDMUX_METRICS_PORT": "tcp://10.0.0.8:9095",
    "REDMUX_METRICS_PORT_9095_TCP_ADDR": "10.0.0.8",
}


def test_variables_of_kubernetes_services_called_redmux_are_ignored_without_a_word(caplog):
    assert load_config([], SERVICE_LINKS) == ServerConfig()
    assert caplog.records == []


def test_a_port_of_ours_is_taken_beside_those_of_a_service():
    config = load_config([], SERVICE_LINKS | {"REDMUX_PORT": "7"})
    assert (config.port, config.metrics_port) == (7, 9095)


def test_an_unknown_variable_is_a_warning_that_names_the_nearest(caplog):
    environ = {"REDMUX_THREAD": "1", "REDMUX_TOMORROWS_OPTION": "1"}
    assert load_config([], environ) == ServerConfig()
    assert caplog.messages == [
        "unknown environment variable REDMUX_THREAD has no effect; did you mean REDMUX_THREADS?",
        "unknown environment variable REDMUX_TOMORROWS_OPTION has no effect",
    ]


def test_a_flag_of_a_truth_value_is_true_without_a_value():
    assert load_config(["--insecure", "--host", "::"], {}).insecure
    assert not load_config(["--insecure", "false"], {}).insecure


GUARDS_LEFT_OPEN = {
    "empty variable": ([], {"REDMUX_API_KEYS": ""}, "REDMUX_API_KEYS is set, but holds no key"),
    "separators alone": ([], {"REDMUX_API_KEYS": " , ,"}, "REDMUX_API_KEYS is set, but holds no"),
    "empty flag": (["--api-keys", ""], {}, "--api-keys is set, but holds no key"),
    "empty array": ("api_keys = []", {}, "api_keys of .* is set, but holds no key"),
    "short": (
        [],
        {"REDMUX_API_KEYS": "long-enough,secret"},
        "key 2 of REDMUX_API_KEYS has 6",
    ),
    "a list in a flag": (["--api-keys", "long-enough,as-well-so"], {}, "key 1 of --api-keys"),
    "no ASCII": ([], {"REDMUX_API_KEYS": "schl\u00fcssel-1"}, "key 1 of REDMUX_API_KEYS"),
    "a client's key": ([], {"REDMUX_API_KEY": "long-enough"}, "set REDMUX_API_KEYS"),
    "a client's empty key": ([], {"REDMUX_API_KEY": ""}, "set REDMUX_API_KEYS"),
    "file without a name": ([], {"REDMUX_API_KEYS_FILE": ""}, "REDMUX_API_KEYS_FILE is empty"),
    "no TLS": ([], {"REDMUX_TLS_CERT": "", "REDMUX_TLS_KEY": ""}, "REDMUX_TLS_CERT is empty"),
    "TLS by the file": ('tls_cert = ""', {}, "tls_cert of .* is empty"),
    "all addresses": (["--host", "0.0.0.0"], {}, "host is '0.0.0.0'.* without API keys"),
    "all addresses of IPv6": ([], {"REDMUX_HOST": "[::]"}, "without API keys"),
    "no host": (["--host", ""], {}, "without API keys"),
    "a name": ("host = 'inference.internal'", {}, "without API keys"),
}


@pytest.mark.parametrize("case", GUARDS_LEFT_OPEN)
def test_nobody_is_let_in_by_a_setting_that_guards_nothing(case, write):
    argv, environ, message = GUARDS_LEFT_OPEN[case]
    argv = argv if isinstance(argv, list) else ["--config", write(argv)]
    with pytest.raises(InvalidArgumentError, match=message):
        load_config(argv, environ)


@pytest.mark.parametrize(
    "guard", [["--insecure"], ["--api-keys", "long-enough"], ["--api-keys-file", "f"]], ids=str
)
def test_a_host_that_others_reach_takes_keys_or_the_word_that_it_shall_be_open(guard):
    assert load_config(["--host", "0.0.0.0", *guard], {}).host == "0.0.0.0"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"])
def test_a_loopback_host_needs_no_keys(host):
    assert load_config(["--host", host], {}).host == host


def test_a_clients_key_beside_the_servers_is_the_clients(write):
    environ = {"REDMUX_API_KEY": "x", "REDMUX_API_KEYS": "long-enough"}
    assert load_config([], environ).api_keys == ("long-enough",)
    assert load_config(["--insecure"], {"REDMUX_API_KEY": "x"}).api_keys == ()


SECRETS = {
    "short": ([], {"REDMUX_API_KEYS": "s3cret"}),
    "blank": ([], {"REDMUX_API_KEYS": "s3cret in two words"}),
    "no list": ("api_keys = 's3cret-as-a-text'", {}),
}


@pytest.mark.parametrize("case", SECRETS)
def test_no_message_repeats_a_key(case, write):
    argv, environ = SECRETS[case]
    with pytest.raises(InvalidArgumentError) as caught:
        load_config(argv if isinstance(argv, list) else ["--config", write(argv)], environ)
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(ServerConfig(api_keys=("s3cret-and-long",)))


UNUSABLE = {
    "variable is no number": ([], {"REDMUX_PORT": "eighty"}, "REDMUX_PORT is 'eighty'"),
    "empty variable": ([], {"REDMUX_PORT": ""}, "REDMUX_PORT is ''"),
    "fraction for a whole number": ([], {"REDMUX_PORT": "1.5"}, "REDMUX_PORT is '1.5'"),
    "flag is no number": (["--max-queue", "many"], {}, "--max-queue is 'many'"),
    "flag is no truth value": (["--prefix-cache", "no"], {}, "--prefix-cache is 'no', must be tr"),
    "truth value in Python's spelling": (
        [],
        {"REDMUX_PREFIX_CACHE": "True"},
        "must be true or fal",
    ),
    "no such file": (["--config", "/nowhere.toml"], {}, "/nowhere.toml"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_cannot_be_read_is_refused_with_its_source(case):
    argv, environ, message = UNUSABLE[case]
    with pytest.raises(InvalidArgumentError, match=message):
        load_config(argv, environ)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_qeue = 1", "unknown option 'max_qeue'"),
        ("port = '80'", "port is '80'"),
        ("port = true", "port is True"),
        ("drain_s = true", "drain_s is True"),
        ("prefix_cache = 1", "prefix_cache is 1"),
        ("model = 3", "model is 3"),
        ("adapters = 'zoo'", "adapters is 'zoo'"),
        ("adapters = ['a', 1]", "adapters is"),
        ("[server]\nport = 1", "unknown option 'server'"),
        ("port 1", "cannot read config file"),
        (f"port = {'9' * 5000}", "cannot read config file"),
        (f"adapters = {'[' * 100_000}", "cannot read config file"),
        ("port = 1\nport = 2", "cannot read config file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(text, message, write):
    path = write(text)
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        load_config(["--config", path], {})
    assert path in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgumentError, match="cannot read"):
        load_config(["--config", str(path)], {})


def test_a_whole_number_is_a_number_of_seconds(write):
    config = load_config(["--config", write("drain_s = 5")], {})
    assert (config.drain_s, type(config.drain_s)) == (5.0, float)


@pytest.mark.parametrize("argv", [["--max-qeue", "1"], ["stray"], ["--port"]])
def test_unknown_or_unfinished_flags_end_the_program(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(argv, {})
    assert caught.value.code == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "values",
    [
        {"port": -1}, {"port": 65536}, {"metrics_port": -1}, {"metrics_port": 65536},
        {"threads": -1}, {"max_running": 0}, {"max_batch_tokens": 0}, {"max_queue": -1},
        {"max_context": -1}, {"kv_cache_tokens": -1}, {"bank_bytes": -1}, {"drain_s": -0.5},
        {"host_cache_bytes": -1}, {"training_share": 0.0}, {"training_share": 1.5},
        {"training_queue": 0}, {"training_max_tokens": 0},
        {"drain_s": float("nan")}, {"drain_s": float("inf")}, {"device": "gpu"},
        {"dtype": "int8"}, {"quantization": "int2"}, {"drafts": "on"}, {"log_level": "loud"},
        {"max_running": 9, "max_batch_tokens": 8}, {"tls_cert": "c"}, {"tls_key": "k"},
        {"host": "10.0.0.7"}, {"training_share": 1.01},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name_and_value(values):
    with pytest.raises(InvalidArgumentError) as caught:
        ServerConfig(**values)
    name, value = list(values.items())[-1]
    assert name in str(caught.value)
    if not name.startswith("tls"):
        assert str(value) in str(caught.value)


NUMBERS = [f.name for f in dataclasses.fields(ServerConfig) if type(f.default) in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_may_be_so_large_that_the_start_hangs(name):
    """All in one: counts, tokens, bytes and seconds, also those of options to come."""
    kind = type(getattr(ServerConfig(), name))
    with pytest.raises(InvalidArgumentError, match=f"^{name} is .*, must be from .* to [0-9]+$"):
        ServerConfig(**{"max_batch_tokens": 1 << 24, name: kind(10**20)})


def test_the_lower_edges_of_every_range_are_allowed():
    ServerConfig(
        port=0, metrics_port=65535, threads=0, max_running=1, max_batch_tokens=1, max_queue=0,
        max_context=0, kv_cache_tokens=0, bank_bytes=0, host_cache_bytes=0, drain_s=0.0,
        tls_cert="c", tls_key="k", training_share=1.0, training_queue=1, training_max_tokens=1,
    )  # fmt: skip


def test_the_upper_edges_that_the_refusals_name_are_allowed():
    highest = {}
    for name in NUMBERS:
        kind = type(getattr(ServerConfig(), name))
        with pytest.raises(InvalidArgumentError) as caught:
            ServerConfig(**{"max_batch_tokens": 1 << 24, name: kind(10**20)})
        highest[name] = kind(str(caught.value).rpartition(" ")[2])
    ServerConfig(**highest)


def test_a_configuration_cannot_be_changed():
    config = ServerConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.port = 1
    assert hash(config) == hash(ServerConfig())


FIELDS = {f.name: f for f in dataclasses.fields(ServerConfig)}


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([f"REDMUX_{name.upper()}" for name in FIELDS]),
        st.one_of(st.text(max_size=12), st.integers().map(str), st.floats().map(str)),
        max_size=4,
    )
)
def test_any_environment_gives_a_valid_configuration_or_a_typed_error(environ):
    try:
        config = load_config([], environ)
    except InvalidArgumentError:
        return
    for name, field in FIELDS.items():
        assert type(getattr(config, name)) is type(field.default)
    assert dataclasses.replace(config) == config  # every check holds for the result
