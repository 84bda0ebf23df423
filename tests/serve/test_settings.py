import argparse
from dataclasses import fields

import pytest

from serve.environment import our_variables, read_env_file
from serve.errors import ConfigError
from serve.profiles import Profile, load_profile
from serve.settings import Source, add_flags, all_settings, boolean, resolve

CPU, CUDA = {"profile": "cpu-tiny"}, {"profile": "524k"}


def test_the_order_is_flag_environment_file_profile_default():
    name, variable = "max_num_seqs", "SERVE_MAX_NUM_SEQS"
    sources = [
        ({**CPU, name: "9"}, {variable: "8"}, {variable: "7"}, 9, Source.FLAG),
        (CPU, {variable: "8"}, {variable: "7"}, 8, Source.ENVIRONMENT),
        (CPU, {}, {variable: "7"}, 7, Source.FILE),
        (CPU, {}, {}, load_profile("cpu-tiny").max_num_seqs, Source.PROFILE),
    ]
    for *given, value, source in sources:
        settings = resolve(*given)
        assert settings[name] == settings.profile.max_num_seqs == value
        assert settings.sources[name] is source
    assert resolve(CPU, {}, {}).sources["port"] is Source.DEFAULT
    assert resolve(CPU, {}, {})["port"] == 8000


def test_each_key_of_a_profile_is_a_setting_and_a_vllm_flag_keeps_its_name():
    known = all_settings()
    for field in fields(Profile):
        if field.name not in ("name", "device"):
            assert known[field.name].flag == "--" + field.name.replace("_", "-")


@pytest.mark.parametrize(
    ("flags", "environment", "file", "message"),
    [
        (CPU, {"SERVE_MAX_SEQS": "1"}, {}, "environment: SERVE_MAX_SEQS: no such setting"),
        (CPU, {}, {"SERVE_X": "1"}, ".env: SERVE_X: no such setting"),
        (CPU, {"SERVE_PORT": "0"}, {}, "environment: SERVE_PORT = '0'; must be in 1..65535"),
        ({**CPU, "port": "x"}, {}, {}, "--port = 'x'; must be a number"),
        ({**CPU, "gateway": "maybe"}, {}, {}, "--gateway = 'maybe'; must be one of on, off"),
        ({**CPU, "shutdown_timeout": "nan"}, {}, {}, "must be a positive number of seconds"),
        (CPU, {"SERVE_THINKING": "maybe"}, {}, "must be one of 1, true, on, 0, false, off"),
        ({**CPU, "kv_cache_dtype": "int8"}, {}, {}, "must be one of auto, fp8, fp8_ds_mla"),
        ({**CPU, "max_num_seqs": "0"}, {}, {}, "max_num_seqs = 0; must be at least 1"),
        ({**CPU, "tensor_parallel_size": "2"}, {}, {}, "profile cpu-tiny is for cpu and has no"),
        ({**CUDA, "cpu_num_threads": "2"}, {}, {}, "profile 524k is for cuda and has no"),
        (
            {**CPU, "otlp_traces_endpoint": "https://me:pass/word@host:4317"},
            {},
            {},
            "--otlp-traces-endpoint = '...@host:4317'; must be without user and password",
        ),
        ({}, {}, {}, "profile: none given; one of"),
        ({"profile": "x"}, {}, {}, "profile 'x' does not exist"),
    ],
)
def test_a_bad_setting_is_refused_with_its_place_value_and_rule(flags, environment, file, message):
    with pytest.raises(ConfigError) as caught:
        resolve(flags, environment, file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "word@" not in str(caught.value)


def test_the_profile_may_come_from_the_environment():
    assert resolve({}, {"SERVE_PROFILE": "524k"}, {}).profile.name == "524k"


@pytest.mark.parametrize("setting", all_settings().values(), ids=lambda s: s.name)
def test_each_setting_has_a_flag(setting):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    words = [setting.flag] if setting.parse is boolean else [setting.flag, "1"]
    assert getattr(parser.parse_args(words), setting.name) is not None
    assert getattr(parser.parse_args([]), setting.name) is None


def test_a_switch_can_be_turned_off():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    flags = vars(parser.parse_args(["--profile", "cpu-tiny", "--no-enforce-eager"]))
    assert resolve(flags, {}, {}).profile.enforce_eager is False


def test_what_was_changed_is_listed_with_its_source():
    settings = resolve({**CPU, "port": "8001"}, {"SERVE_KV_CACHE_DTYPE": "fp8"}, {})
    assert settings.changed() == [
        "kv_cache_dtype = fp8 (environment)",
        "port = 8001 (flag)",
        "profile = cpu-tiny (flag)",
    ]


def test_an_env_file_is_read_as_compose_reads_it(tmp_path):
    path = tmp_path / ".env"
    path.write_text(
        "# comment\n\nHF_HOME=/x y\nexport SERVE_PORT = 8001 # why\nSERVE_HOST='::' # why\n"
        'SERVE_MODEL="a b#c"\nSERVE_PROFILE=\n'
    )
    assert read_env_file(path) == {
        "SERVE_PORT": "8001",
        "SERVE_HOST": "::",
        "SERVE_MODEL": "a b#c",
        "SERVE_PROFILE": "",
    }
    assert read_env_file(tmp_path / "absent") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SERVE_PORT\n", "line 1: must be NAME=VALUE"),
        ("SERVE_PORT='8\n", "line 1: must be NAME=VALUE"),
        ("SERVE_PORT=1\nSERVE_PORT=2\n", "line 2: SERVE_PORT is given twice"),
    ],
)
def test_a_bad_env_file_is_refused(tmp_path, text, message):
    path = tmp_path / ".env"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_env_file(path)


def test_only_our_variables_are_settings():
    assert our_variables({"PATH": "/bin", "SERVE_PORT": "1"}) == {"SERVE_PORT": "1"}
