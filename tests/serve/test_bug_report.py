"""`serve report`: what is in the archive, and what is in no byte of it."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from serve.bug_report import secrets
from serve.redact import Redactor
from tests.serve.front_process import running_front, wait_until
from tests.serve.test_log import requests_of

ROOT = Path(__file__).parents[2]
KEY, OTHER_KEY = "first-0123456789abcdef", "other-0123456789abcdef"
RUN_S = 600  # the doctor is in it
PROMPT = "Tell nobody about Zanzibar."


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    """A server with keys that everything needs, a stalled life behind it, and a home."""
    folder = tmp_path_factory.mktemp("f")
    (folder / "keys").write_text(f"# mine\nalice {KEY}\nbob {OTHER_KEY} 2\n")
    record = folder / "load.json"
    record.write_text(json.dumps({"schema_version": 1, "model": str(folder / "home" / "m")}))
    (folder / "home").mkdir()
    (folder / "reports").mkdir()
    (folder / "reports" / "stall-1.json").write_text(
        json.dumps(
            {
                "log": [f'{{"event": "request", "key": "alice", "x": "Bearer {KEY}"}}'],
                "stacks": [f"File {folder}/home/x.py", f"prompt: '{PROMPT}'"],
                "environment": {"VLLM_API_KEY": "short"},
            }
        )
    )
    config = {"keys": str(folder / "keys"), "load_record": str(record)}
    config |= {"status_access": "key", "metrics_access": "key", "monitor_interval_s": 0.1}
    with running_front(folder, [{}], **config) as front:
        front.wait_until_ready()
        for key in (KEY, OTHER_KEY):
            body = {"events": 2, "prompt": PROMPT}
            front.ask("POST", "/v1/completions", body, {"Authorization": f"Bearer {key}"})
        wait_until(lambda: len(requests_of(front)) == 2, "both are logged")
        yield front


def make_report(front, *options, output="report.tar.gz", **variables):
    """Run the command; returns what it said, and its archive's files."""
    command = [sys.executable, "-m", "serve", "report", "--profile", "cpu-tiny"]
    command += ["--port", str(front.port), "--api-key-file", str(front.folder / "keys")]
    command += ["--report-dir", str(front.folder / "reports"), "--output", output, *options]
    command += ["--load-record", str(front.folder / "load.json")]
    environment = os.environ | {
        "HOME": str(front.folder / "home"),
        "PYTHONPATH": str(ROOT),
        "HF_TOKEN": "hf_" + "a" * 30,
        **variables,
    }
    done = subprocess.run(
        command, cwd=front.folder, env=environment, capture_output=True, check=False, timeout=RUN_S
    )
    assert done.returncode == 0, done.stderr
    data = done.stdout if output == "-" else (front.folder / output).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        entries = tar.getmembers()
        assert {(e.uname, e.gname, e.uid, e.gid) for e in entries} == {("", "", 0, 0)}
        files = {e.name.removeprefix("serve-report/"): tar.extractfile(e).read() for e in entries}
    return done, files


@pytest.fixture(scope="module")
def report(front):
    log = front.folder / "output"
    log.write_text(front.log() + f"it was {OTHER_KEY}\nprompt: '{PROMPT}'\n")
    return make_report(front, "--log", str(log))[1]


def test_it_holds_what_the_machine_and_the_server_say(front, report):
    said = {name: json.loads(data) for name, data in report.items() if name.endswith(".json")}
    assert said["contents.json"]["files"].keys() == report.keys() - {"contents.json"}
    assert "port" in {finding["check"] for finding in said["doctor.json"]["findings"]}
    values = said["settings.json"]["values"]
    assert values["port"] == {"value": front.port, "source": "flag"}
    assert values["api_key_file"]["value"] == "given"
    assert values["max_num_seqs"]["source"] == "profile"
    assert said["versions.json"]["packages"]["pytest"]
    assert said["versions.json"]["commit"]
    assert said["load_record.json"]["schema_version"] == 1
    assert said["status.json"]["stage"] == "ready"
    assert said["status.json"]["requests"]["by_key"] == {"key-1": 1, "key-2": 1}
    assert said["evidence/stall-1.json"]["environment"] == {"VLLM_API_KEY": "[key]"}
    page = report["metrics.txt"].decode()
    assert 'dsv4_serve_key_requests_total{key="key-2"} 1.0' in page
    assert "vllm:generation_tokens_total" in page
    assert '"event": "request"' in report["log.txt"].decode()
    assert "key-1" in report["log.txt"].decode()


def test_no_key_no_prompt_and_nobody_is_in_it(front, report):
    everything = b"\n".join([*report.values(), " ".join(report).encode()])
    for secret in (KEY, OTHER_KEY, "hf_aaa", "Zanzibar", "alice", "bob", "short"):
        assert secret.encode() not in everything, secret
    assert str(front.folder / "home").encode() not in everything
    assert b"~/m" in report["load_record.json"]


def test_without_a_server_it_says_what_is_missing(front, tmp_path):
    """Nor does a setting that `run` would refuse keep it from being written."""
    done, files = make_report(front, "--port", "1", "--max-num-seqs", "many", output="-")
    absent = json.loads(files["contents.json"])["absent"]
    assert {"status.json", "metrics.txt", "log.txt"} <= absent.keys()
    assert "refused" in absent["status.json"].lower()
    assert b"without status.json" in done.stderr
    assert "--max-num-seqs = 'many'" in json.loads(files["settings.json"])["refused"]
    assert json.loads(files["load_record.json"])


def test_refused_settings_are_reported_and_the_sound_ones_used(front):
    flags = ("--port", "x", "--profile", "none")
    _, files = make_report(front, *flags, SERVE_NO_SUCH="1", SERVE_MODEL="nowhere")
    assert "SERVE_NO_SUCH: no such setting" in json.loads(files["settings.json"])["refused"]
    assert json.loads(files["doctor.json"])["model"] == "nowhere"
    assert "evidence/stall-1.json" in files


def test_it_is_this_users_alone_and_heeds_variables(front):
    _, files = make_report(front, "--port", "1", SERVE_MODEL="nowhere")
    assert json.loads(files["doctor.json"])["model"] == "nowhere"
    assert (front.folder / "report.tar.gz").stat().st_mode & 0o777 == 0o600
    assert not list(front.folder.glob(".report*"))


def test_a_folder_that_is_not_there_is_refused(front):
    command = [sys.executable, "-m", "serve", "report", "--output", "none/x", "--port", "1"]
    done = subprocess.run(
        command, cwd=front.folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        check=False, timeout=RUN_S,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1].startswith("serve: --output none/x: No such file")


def test_a_short_key_of_the_environment_is_taken_out(monkeypatch, tmp_path):
    """`serve` takes one of any length from there; from a file none under 16 characters."""
    monkeypatch.setenv("VLLM_API_KEY", "my-own-key-1")
    keys = tmp_path / "keys"
    keys.write_text(f"alice {KEY}\nnot a key\n")
    redactor = Redactor(secrets(keys))
    assert redactor.text(f"sent my-own-key-1 or {KEY}; a page") == "sent [key] or [key]; a page"


def test_the_image_s_user_is_nobody():
    """Its name begins each of our metrics."""
    redactor = Redactor([], Path("/caches/home"), "dsv4", "tower")
    assert redactor.text("dsv4_serve_ready 1 in /caches/0/dsv4-maxq") == (
        "dsv4_serve_ready 1 in /caches/0/dsv4-maxq"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Authorization: Bearer abc.def", "Authorization: Bearer [key]"),
        ("key first-0123456789abcdef!", "key [key]!"),
        ("Authorization: Basic YWJj", "Authorization: Basic [key]"),
        ("basic checks, x-api-key header", "basic checks, x-api-key header"),
        ("{'api_key': ['abc', 'def'], 'port': 1}", "{'api_key': [key], 'port': 1}"),
        ("--api-key abc --port 1", "--api-key [key] --port 1"),
        ("HF_TOKEN=abc", "HF_TOKEN=[key]"),
        ('{"password": "abc", "n": 1}', '{"password": "[key]", "n": 1}'),
        ("api_key=None", "api_key=None"),
        ("max_tokens=5, num_speculative_tokens: 1", "max_tokens=5, num_speculative_tokens: 1"),
        ("https://me:pw@collector:4317/x", "https://[key]@collector:4317/x"),
        ("sk-0123456789abcdefghij", "[key]"),
        ("Request 7: prompt: 'a\\nb', params", "Request 7: prompt: [cut]"),
        ("prompt_token_ids: [1, 2]", "prompt_token_ids: [cut]"),
        ('{"messages": [{"content": "a"}]}', '{"messages": [cut]'),
        ("'input_value': 'a'", "'input_value': [cut]"),
        ("input_value='a'", "input_value=[cut]"),
        ("/data/alice/x by alice@tower", "/data/[user]/x by [user]@[host]"),
        ("malice, alices", "malice, alices"),
        ("/srv/alice-home/models", "~/models"),
        ("/home/carol/models", "~/models"),
        ("from 10.1.2.3:5 to 127.0.0.1:8000", "from [address]:5 to 127.0.0.1:8000"),
        ("cuBLAS 13.0.1.400, driver 580.95.05", "cuBLAS 13.0.1.400, driver 580.95.05"),
        ("tower.example.org", "[host]"),
        ("GPU-01234567-89ab-cdef-0123-456789abcdef", "GPU-[uuid]"),
    ],
)
def test_what_is_taken_out_of_text(text, shown):
    redactor = Redactor([KEY], Path("/srv/alice-home"), "alice", "tower.example.org")
    assert redactor.text(text) == shown
    assert redactor.json({"a": [text]}) == {"a": [shown]}
