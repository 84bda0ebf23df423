import contextlib
import sys

import pytest

from bench import launch
from bench.launch import Service, StepError, launch_vllm, run_retrofit


def fake_module(monkeypatch, tmp_path, code: str) -> None:
    """`python -m retrofit` runs this code."""
    (tmp_path / "retrofit.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_progress_is_said_and_the_last_line_returned(monkeypatch, tmp_path):
    code = "print('x [#.] 1/2, 0:01 passed, 0:01 left')\nprint('other')\nprint('written')"
    fake_module(monkeypatch, tmp_path, code)
    said = []
    assert run_retrofit(["mtp"], tmp_path / "log", said.append) == "written"
    assert said == ["  x [#.] 1/2, 0:01 passed, 0:01 left"]
    assert "other" in (tmp_path / "log").read_text()


def test_a_failure_carries_the_end_of_the_log(monkeypatch, tmp_path):
    fake_module(monkeypatch, tmp_path, "raise SystemExit('retrofit: no such folder')")
    with pytest.raises(StepError, match=r"(?s)retrofit verify: exit status 1.*no such folder"):
        run_retrofit(["verify", "x"], tmp_path / "log", print)


@pytest.mark.parametrize("capture", [None, "rows"])
def test_the_server_is_started_with_what_the_service_says(monkeypatch, tmp_path, capture):
    seen = []

    @contextlib.contextmanager
    def running(command, url, log, timeout_s):
        seen.append((command, url, log, timeout_s))
        yield

    monkeypatch.setattr(launch, "running_server", running)
    folder = tmp_path / capture if capture else None
    with launch_vllm(Service("p", tmp_path / "m", 2, tmp_path / "log", 9.0, folder)) as url:
        pass
    ((command, used_url, log, timeout_s),) = seen
    assert (url, log, timeout_s) == (used_url, tmp_path / "log", 9.0)
    assert command[:6] == [sys.executable, "-m", "serve", "run", "--profile", "p"]
    assert command[command.index("--num-speculative-tokens") + 1] == "2"
    assert ("--capture" in command) == (capture is not None)
