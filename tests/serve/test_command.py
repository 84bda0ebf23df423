import json
from dataclasses import replace
from pathlib import Path

import pytest

from serve.allreduce_tier import Tier
from serve.command import vllm_command
from serve.environment import CAPTURE_DIR, engine_environment
from serve.errors import ConfigError
from serve.profiles import KvCacheDtype, load_profile, profile_names

PROFILE = load_profile("cpu-tiny")


def command(profile=PROFILE, num_speculative_tokens=1):
    return vllm_command(profile, Path("/model"), "127.0.0.1", 8000, num_speculative_tokens)


def value(arguments, flag):
    return arguments[arguments.index(flag) + 1]


def test_speculation_is_mtp_with_the_number_asked_for():
    config = json.loads(value(command(num_speculative_tokens=2), "--speculative-config"))
    assert config == {"method": "mtp", "num_speculative_tokens": 2}


def test_without_speculation_there_is_no_speculative_flag():
    assert not [flag for flag in command(num_speculative_tokens=0) if "spec" in flag]


@pytest.mark.parametrize(
    ("field", "changed", "flag", "expected"),
    [
        ("served_model_name", "x", "--served-model-name", "x"),
        ("max_model_len", 8192, "--max-model-len", "8192"),
        ("max_num_seqs", 2, "--max-num-seqs", "2"),
        ("max_num_batched_tokens", 512, "--max-num-batched-tokens", "512"),
        ("kv_cache_dtype", KvCacheDtype.FP8, "--kv-cache-dtype", "fp8"),
        ("thinking", True, "--default-chat-template-kwargs", '{"thinking": true}'),
    ],
)
def test_each_profile_field_changes_its_flag(field, changed, flag, expected):
    assert value(command(), flag) != expected
    assert value(command(replace(PROFILE, **{field: changed})), flag) == expected


@pytest.mark.parametrize("field", ["enforce_eager", "enable_auto_tool_choice", "enable_scale_out"])
def test_each_switch_is_a_flag_that_comes_or_not(field):
    flag = "--" + field.replace("_", "-")
    assert flag in command(replace(PROFILE, **{field: True}))
    assert flag not in command(replace(PROFILE, **{field: False}))


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_reads_reasoning_and_tool_calls_of_this_model(name):
    arguments = command(load_profile(name))
    assert value(arguments, "--reasoning-parser") == "deepseek_v4"
    assert value(arguments, "--tool-call-parser") == "deepseek_v4"
    assert "--enable-auto-tool-choice" in arguments


@pytest.mark.parametrize(
    ("field", "changed", "variable", "expected"),
    [
        ("cpu_kv_cache_gib", 3, "VLLM_CPU_KVCACHE_SPACE", "3"),
        ("cpu_num_threads", 2, "OMP_NUM_THREADS", "2"),
    ],
)
def test_each_cpu_field_changes_its_variable(field, changed, variable, expected):
    assert engine_environment(PROFILE, {})[variable] != expected
    changed_profile = replace(PROFILE, **{field: changed})
    assert engine_environment(changed_profile, {})[variable] == expected


@pytest.mark.parametrize(
    ("field", "changed", "flag", "expected"),
    [
        ("tensor_parallel_size", 1, "--tensor-parallel-size", "1"),
        ("gpu_memory_utilization", 0.9, "--gpu-memory-utilization", "0.9"),
    ],
)
def test_each_gpu_field_changes_its_flag(field, changed, flag, expected):
    profile = load_profile("524k")
    assert value(command(profile), flag) != expected
    assert value(command(replace(profile, **{field: changed})), flag) == expected


def test_only_a_gpu_profile_has_the_gpu_s_flags_and_only_a_cpu_profile_the_cpu_s_variables():
    gpu = load_profile("524k")
    assert "--disable-custom-all-reduce" in command(gpu)
    assert "--disable-custom-all-reduce" not in command()
    assert "VLLM_CPU_KVCACHE_SPACE" not in engine_environment(gpu, {})


@pytest.mark.parametrize("tier", [*Tier, None])
def test_each_all_reduce_has_its_worker_and_vllm_s_own_is_on_for_none_but_itself(tier):
    given = vllm_command(load_profile("524k"), Path("/m"), "127.0.0.1", 8000, 1, tier=tier)
    assert ("--disable-custom-all-reduce" in given) == (tier is not Tier.VLLM_CUSTOM)
    ours = tier in (Tier.PEER_PUSH, Tier.HOST_PINNED)
    assert ("--worker-cls" in given) == ours
    if ours:
        module, _, name = value(given, "--worker-cls").rpartition(".")
        source = Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py")
        assert f"class {name}(" in source.read_text()


@pytest.mark.parametrize("tier", [*Tier, None])
def test_two_ranks_never_fuse_their_all_reduce_past_the_tier(tier):
    given = vllm_command(load_profile("524k"), Path("/m"), "127.0.0.1", 8000, 1, tier=tier)
    config = json.loads(value(given, "--compilation-config"))
    assert config == {"pass_config": {"fuse_allreduce_rms": False}}
    for profile in (replace(load_profile("524k"), tensor_parallel_size=1), PROFILE):
        assert "--compilation-config" not in command(profile)


def test_the_engine_is_offline_and_sends_no_usage_statistics():
    env = engine_environment(PROFILE, {"PATH": "/bin", "HF_HUB_OFFLINE": "0"})
    assert env["HF_HUB_OFFLINE"] == env["VLLM_NO_USAGE_STATS"] == env["DO_NOT_TRACK"] == "1"
    assert env["PATH"] == "/bin"


def test_plugins_that_leave_ours_out_are_refused():
    assert engine_environment(PROFILE, {"VLLM_PLUGINS": "a,dsv4_maxq"})
    with pytest.raises(ConfigError, match="VLLM_PLUGINS = 'a'; must include dsv4_maxq"):
        engine_environment(PROFILE, {"VLLM_PLUGINS": "a"})


def test_capture_gives_the_draft_no_rejected_tokens_and_runs_eagerly():
    profile = replace(PROFILE, enforce_eager=False)
    arguments = vllm_command(profile, Path("/model"), "127.0.0.1", 8000, 1, capture=True)
    assert json.loads(value(arguments, "--speculative-config"))["disable_padded_drafter_batch"]
    assert "--enforce-eager" in arguments


def test_capture_names_its_folder_to_the_plugin():
    assert "DSV4_CAPTURE_DIR" not in engine_environment(PROFILE, {})
    env = engine_environment(PROFILE, {}, capture=Path("/rows"))
    assert env["DSV4_CAPTURE_DIR"] == "/rows"


def test_the_plugin_reads_the_variable_that_is_set():
    control = Path(__file__).parents[2] / "retrofit" / "control.py"
    assert f'CAPTURE_DIR = "{CAPTURE_DIR}"' in control.read_text()
