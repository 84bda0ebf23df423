"""`python -m bench eval`: what goes wrong is one clear line and the right exit status."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.eval import lm_eval, sandbox
from bench.eval.cli import main
from bench.eval.config import EvalConfig, TaskName
from bench.load.cli import API_KEY_VARIABLE
from bench.load.errors import LoadError
from bench.load.server import ServerFacts
from bench.server import free_port
from tests.bench.eval.chat_server import ChatServer, Reply, serving
from tests.bench.eval.test_run import ROWS, WRONG, script

ROOT = Path(__file__).parents[3]
FACTS = ServerFacts("fake", 65536, "0.32.0", None, None)
CACHE = {"block_size": "256", "cache_dtype": "fp8", "num_gpu_blocks": "100"}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "eval.json"


def ended(capsys, *arguments) -> tuple[int, str]:
    """Exit status and the one line of complaint."""
    capsys.readouterr()
    status = main([*map(str, arguments)])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bench eval")]
    assert len(said) == (status != 0), said
    return status, "".join(said)


def test_an_absent_server(capsys, output):
    url = f"http://127.0.0.1:{free_port()}"
    status, said = ended(capsys, "--url", url, "--tasks", "mini-math", "--result", output)
    assert status == 3
    assert f"{url}/v1/models: no server" in said
    assert not output.exists()


# pytest-xdist shows a test's name as its process's command line, which a result records.
@pytest.mark.parametrize(
    ("key", "status"), [(None, 3), ("wrong", 3), ("s3cret", 0)], ids=["none", "wrong", "right"]
)
def test_the_key(capsys, output, monkeypatch, key, status):
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    if key:
        monkeypatch.setenv(API_KEY_VARIABLE, key)
    server = script()
    server.key = "s3cret"
    with serving(server) as url:
        found, said = ended(capsys, "--url", url, "--tasks", "mini-math", "--result", output)
    assert found == status
    assert ("HTTP 401: the key is wrong or missing" in said) == (status == 3)
    for path in output.parent.iterdir():
        assert "s3cret" not in path.read_text()


def test_a_model_that_is_not_listed(capsys, output):
    with serving(script()) as url:
        status, said = ended(
            capsys, "--url", url, "--model", "other", "--tasks", "mini-math", "--result", output
        )
    assert (status, said) == (2, "bench eval: model other: the server has fake")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", "gsm8k", "--gsm8k", "{tmp}/none.jsonl"], "none.jsonl: No such file"),
        (["--tasks", "gsm8k", "--gsm8k", "{tmp}/bad.jsonl"], "bad.jsonl: line 1: not JSON"),
        (["--tasks", "mmlu"], "mmlu: no package carries its items"),
        (["--tasks", "long", "--contexts", "8k"], "context 8k: the server's window is 4096"),
        (["--tasks", "mini-math,mini-math"], "each at most once"),
        (["--tasks", "mini-math", "--base", "{tmp}/bad.jsonl"], "bad.jsonl: not JSON"),
        (["--tasks", "mini-math", "--base", "{tmp}/other.json"], "not a result of `bench eval`"),
        (["--tasks", "mini-math", "--streams", "0"], "streams = 0; must be at least 1"),
        (["--tasks", "mini-math", "--depths", "1.5"], "depth 1.5; must be a share"),
        (["--resume", "{tmp}/none.items.jsonl"], "none.items.jsonl: No such file"),
        (["--resume", "{tmp}/bad.jsonl"], "bad.jsonl: not a journal"),
        (["--resume", "{tmp}/load.jsonl"], "load.jsonl: not a journal of `bench eval`"),
    ],
)
def test_bad_input(capsys, tmp_path, arguments, says):
    (tmp_path / "bad.jsonl").write_text("{not\n")
    (tmp_path / "other.json").write_text(json.dumps({"kind": "load"}))
    (tmp_path / "load.jsonl").write_text(json.dumps({"schema_version": 1, "config": {}}) + "\n")
    arguments = [text.format(tmp=tmp_path) for text in arguments]
    result = [] if "--resume" in arguments else ["--result", tmp_path / "eval.json"]
    with serving(script()) as url:
        status, said = ended(capsys, "--url", url, *arguments, *result)
    assert status == 2
    assert says in said


@pytest.mark.parametrize(
    "arguments", [["--tasks", "gsm9k"], ["--reasoning", "maybe"], ["--nonsense"]]
)
def test_arguments_that_are_none(capsys, arguments):
    with pytest.raises(SystemExit) as ended_with:
        main(arguments)
    assert ended_with.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def test_a_score_that_is_not_valid_is_printed_so_and_exits_with_1(capsys, output):
    refused = Reply("I'm sorry, but I can't help with that.")
    with serving(script(refused, refused)) as url:
        status = main(["--url", url, "--tasks", "mini-math", "--result", str(output)])
    out, err = capsys.readouterr()
    assert status == 1
    assert "not valid (91.7 %" in out
    assert "not valid: mini-math: 8.3% invalid, more than 5%" in err


def test_a_quick_run_says_what_it_cannot_see(capsys, output):
    with serving(script()) as url:
        arguments = ["--url", url, "--tasks", "mini-math", "--quick", "--result", str(output)]
        assert main(arguments) == 0
    assert "24 items are a smoke test; a loss of less than" in capsys.readouterr().out


def test_a_loss_against_a_base_exits_with_1(capsys, output):
    base = output.with_name("base.json")
    with serving(script()) as url:
        assert main(["--url", url, "--tasks", "mini-math", "--result", str(base)]) == 0
    with serving(script(*[WRONG] * 6)) as url:
        arguments = ["--url", url, "--tasks", "mini-math", "--base", base, "--result", output]
        status, said = ended(capsys, *arguments)
    assert (status, said) == (1, "bench eval: accuracy was lost: mini-math by 25.0 points")


def test_code_is_refused_without_a_sandbox(capsys, output, monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: None)
    server = script()
    with serving(server) as url:
        status, said = ended(capsys, "--url", url, "--tasks", "mini-code", "--result", output)
    assert status == 2
    assert "programs of a model are not run without a sandbox: bwrap is not installed" in said
    assert not server.bodies


# ---- resume ----


def cut_short(server: ChatServer, output, *options) -> Path:
    """A run that lost its server after five items."""
    server.die_at = 5
    with serving(server) as url:
        assert main(["--url", url, "--tasks", "mini-math", *options, "--result", str(output)]) == 3
    return output.with_suffix(".items.jsonl")


def test_a_run_that_lost_its_server_tells_how_to_go_on(capsys, output):
    journal = cut_short(script(), output)
    assert f"python -m bench eval --resume {journal}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--temperature", "0.7", "was begun with temperature = 0.0, not 0.7"),
        ("--limit", "5", "was begun with limit = None, not 5"),
        ("--tasks", "mini-choice", "was begun with tasks = mini-math, not mini-choice"),
        ("--reasoning", "on", "was begun with reasoning = auto, not on"),
        ("--result", "other.json", "a resumed run writes its result beside its journal"),
    ],
)
def test_other_settings_do_not_go_on(capsys, output, option, value, says):
    journal = cut_short(script(), output)
    server = script()
    with serving(server) as url:
        status, said = ended(capsys, "--url", url, "--resume", journal, option, value)
    assert status == 2
    assert says in said
    assert not server.bodies


def test_recorded_settings_go_on(capsys, output):
    journal = cut_short(script(), output, "--temperature", "0.7", "--limit", "9")
    server = script()
    with serving(server) as url:
        assert ended(capsys, "--url", url, "--resume", journal) == (0, "")
    assert {body["temperature"] for body in server.bodies} == {0.7}
    assert json.loads(output.read_text())["tasks"][0]["n"] == 9


@pytest.mark.parametrize(
    ("now", "status"),
    [
        ({"num_gpu_blocks": "90", "block_size": "128"}, 0),
        ({"cache_dtype": "auto"}, 2),
    ],
)
def test_what_of_the_cache_changes_no_answer_may_change(capsys, output, now, status):
    first, again = script(), script()
    first.cache, again.cache = CACHE, CACHE | now
    journal = cut_short(first, output)
    with serving(again) as url:
        found, said = ended(capsys, "--url", url, "--resume", journal)
    assert found == status
    assert ("was begun with server cache fp8; now it is auto" in said) == (status == 2)


def test_other_items_do_not_go_on(capsys, tmp_path, output):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    server = script()
    server.die_at = 3
    asked = ["--tasks", "gsm8k", "--gsm8k", own]
    with serving(server) as url:
        assert ended(capsys, "--url", url, *asked, "--result", output)[0] == 3
    own.write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    with serving(script()) as url:
        journal = output.with_suffix(".items.jsonl")
        status, said = ended(capsys, "--url", url, "--gsm8k", own, "--resume", journal)
    assert status == 2
    assert "was begun with items of gsm8k" in said


# ---- lm-evaluation-harness ----


def test_lm_eval_gets_the_same_endpoint_and_limits(tmp_path):
    config = EvalConfig(
        url="http://host:1/", tasks=(TaskName.GSM8K, TaskName.MMLU), limit=7, streams=3,
        max_tokens=99, temperature=0.5, seed=4, reasoning="off",
    )  # fmt: skip
    command = lm_eval.command(config, FACTS, tmp_path / "out.json")
    text = " ".join(command)
    for part in (
        "base_url=http://host:1/v1/chat/completions,model=fake,num_concurrent=3",
        "--tasks gsm8k_cot_zeroshot,mmlu_generative", "--limit 7", "--seed 4",
        f"--output_path {tmp_path / 'out'}",
    ):  # fmt: skip
        assert part in text
    assert json.loads(command[command.index("--gen_kwargs") + 1]) == {
        "temperature": 0.5, "max_gen_toks": 99, "chat_template_kwargs": {"thinking": False},
    }  # fmt: skip
    auto = lm_eval.command(replace(config, reasoning="auto"), FACTS, tmp_path / "out.json")
    assert "thinking" not in " ".join(auto)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tasks": (TaskName.LONG,)}, "long: lm-evaluation-harness has no such task"),
        ({"tasks": (TaskName.HUMANEVAL,)}, "runs programs without a sandbox"),
        ({"gsm8k": Path("a.jsonl")}, "gsm8k: is not for lm-evaluation-harness"),
        ({"contexts": (8000,)}, "contexts: is not for lm-evaluation-harness"),
    ],
)
def test_what_lm_eval_cannot_do_is_refused(settings, says):
    with pytest.raises(LoadError, match=says):
        lm_eval.command(EvalConfig(**settings), FACTS, Path("out.json"))


def test_lm_eval_is_run_where_it_is_on_path(capsys, tmp_path, output, monkeypatch):
    """A program of its name stands in: it keeps what it was given, and ends as it is told."""
    program = tmp_path / "lm_eval"
    told = tmp_path / "told.json"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], os.environ['OPENAI_API_KEY']], open({str(told)!r}, 'w'))\n"
        "raise SystemExit(int(os.environ['ENDS_WITH']))\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv(API_KEY_VARIABLE, "s3cret")
    arguments = ["--engine", "lm-eval", "--tasks", "gsm8k", "--result", output]
    with serving(script()) as url:
        monkeypatch.setenv("ENDS_WITH", "0")
        assert ended(capsys, "--url", url, *arguments) == (0, "")
        given, key = json.loads(told.read_text())
        assert f"base_url={url}/v1/chat/completions" in " ".join(given)
        assert (key, "s3cret" in " ".join(given)) == ("s3cret", False)
        monkeypatch.setenv("ENDS_WITH", "5")
        assert ended(capsys, "--url", url, *arguments) == (1, "bench eval: lm_eval: exit status 5")
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
        status, said = ended(capsys, "--url", url, *arguments)
        assert status == 2
        assert "lm_eval is not installed" in said
        status, said = ended(capsys, "--url", url, *arguments, "--base", output)
        assert (status, said.partition(": ")[2]) == (
            2, "--base: lm-evaluation-harness writes results of its own",
        )  # fmt: skip


# ---- make eval ----


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        ("URL=http://a:1 TASKS=long STREAMS=2", "run --url http://a:1 --tasks long --streams 2"),
        ("QUICK=1 GSM8K=a.jsonl", "run --gsm8k a.jsonl --quick"),
        ("PARITY=1", "parity --profile cpu-tiny"),
        ("PARITY=1 PROFILE=524k NUM_PROMPTS=9", "parity --profile 524k --num-prompts 9"),
        ("PARITY=1 OFF_URL=http://a:1 ON_URL=http://b:2",
         "parity --off-url http://a:1 --on-url http://b:2"),
    ],
)  # fmt: skip
def test_make_eval_passes_its_variables_on(variables, command):
    assert f"-m bench eval {command}" in " ".join(
        make(variables).stdout.replace("\\\n", "").split()
    )


def test_make_eval_with_parity_and_one_url_says_what_it_needs():
    done = make("PARITY=1 URL=http://a:1")
    assert done.returncode == 2
    assert "PARITY=1 compares two servers: OFF_URL= and ON_URL=, or PROFILE=" in done.stderr


def make(variables: str) -> subprocess.CompletedProcess[str]:
    """What would be run; nothing of setup."""
    command = ["make", "--dry-run", "--old-file=.venv/.dsv4-maxq", "eval", *variables.split()]
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
