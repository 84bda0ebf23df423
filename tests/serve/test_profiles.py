import pytest

from serve.errors import ConfigError
from serve.profiles import PROFILE_DIR, load_profile, profile_names


@pytest.fixture
def folder(tmp_path):
    """A copy of the profiles to damage."""
    for name in profile_names():
        (tmp_path / f"{name}.toml").write_bytes((PROFILE_DIR / f"{name}.toml").read_bytes())
    return tmp_path


def replace(folder, old, new, name="cpu-tiny"):
    path = folder / f"{name}.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_loads(name):
    assert load_profile(name).name == name


def test_an_unknown_profile_is_refused_with_the_known_ones(folder):
    with pytest.raises(ConfigError, match=r"'nope' does not exist; there are \[.*'cpu-tiny'\]"):
        load_profile("nope", folder)


def test_a_path_is_no_profile_name():
    with pytest.raises(ConfigError, match="does not exist"):
        load_profile("../profiles/cpu-tiny")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_num_seqs = 4", "max_num_seq = 4", "unknown key 'max_num_seq'"),
        ("max_num_seqs = 4", "", "key 'max_num_seqs' is missing"),
        ("max_num_seqs = 4", "max_num_seqs = 0", "max_num_seqs = 0; must be at least 1"),
        ("max_num_seqs = 4", "max_num_seqs = '4'", "max_num_seqs = '4'; must be of type int"),
        ("max_num_seqs = 4", "max_num_seqs = true", "must be of type int"),
        ("cpu_num_threads = 1", "cpu_num_threads = 0", "must be at least 1"),
        ("max_model_len = 4096", "max_model_len = -1", "max_model_len = -1; must be at least 1"),
        ("block_size = 256", "block_size = 16", "block_size = 16; DeepSeek-V4 takes 256 only"),
        ('"auto"', '"int8"', "kv_cache_dtype = 'int8'; must be one of auto, fp8, fp8_ds_mla"),
        ('g_parser = "deepseek_v4"', 'g_parser = "x"', "reasoning_parser = 'x'; must be one of"),
        ('l_parser = "deepseek_v4"', 'l_parser = "x"', "tool_call_parser = 'x'; must be one of"),
        ("tokens = 1\n", "tokens = 4\n", r"num_speculative_tokens = 4; must be in 0\.\.3"),
        ('"dsv4-tiny"', '""', "served_model_name = ''; must not be empty"),
        ('name = "cpu-tiny"', 'name = "other"', "name = 'other'; must be the file's name"),
        ("thinking = false", "thinking = ", "not TOML"),
        ('device = "cpu"', 'device = "tpu"', "unknown key 'cpu_kv_cache_gib'"),
        ('device = "cpu"', "", "unknown key"),
        ("cpu_num_threads = 1", "tensor_parallel_size = 2", "unknown key 'tensor_parallel_size'"),
    ],
)
def test_a_bad_profile_is_refused_in_one_line(folder, old, new, message):
    replace(folder, old, new)
    with pytest.raises(ConfigError, match=message) as caught:
        load_profile("cpu-tiny", folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gpu_memory_utilization = 0.93", "gpu_memory_utilization = 1.0", "must be between 0 and"),
        ("gpu_memory_utilization = 0.93", "gpu_memory_utilization = 1", "must be of type float"),
        ("tensor_parallel_size = 2", "tensor_parallel_size = 0", "must be at least 1"),
        ("tensor_parallel_size = 2", "", "key 'tensor_parallel_size' is missing"),
        ("tensor_parallel_size = 2", "cpu_num_threads = 2", "unknown key 'cpu_num_threads'"),
    ],
)
def test_a_bad_gpu_profile_is_refused_in_one_line(folder, old, new, message):
    replace(folder, old, new, "524k")
    with pytest.raises(ConfigError, match=message):
        load_profile("524k", folder)
