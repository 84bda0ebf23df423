#!/usr/bin/env python3
"""vLLM's own API tests against the tiny model on a CPU: past our gateway, then through it.

    python scripts/vllm_api_tests.py SOURCE --out results/vllm-api-tests-NAME [--files FILE...]

SOURCE is vLLM's source distribution of the pinned version: the .tar.gz or the unpacked folder.
`vllm_api_plugin.py` puts a server of `serve run` in the place of those that the tests would start,
runs each test directly and through the gateway, and leaves out tests that start no server. The
direct way goes past the gateway to the same engine: through a process that copies bytes to its
socket (`serve.overhead`). The names of their models become the tiny one's.
Writes OUT.json and OUT.md. Exit status 1: a test passed directly and not through the gateway.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.server import free_port  # noqa: E402
from serve.environment import run_path  # noqa: E402
from serve.versions import collect_versions  # noqa: E402

SCHEMA_VERSION = 1
MODEL = "tiny/checkpoint"  # served under its path, because tests read the tokenizer of the model
SETTINGS = ("--profile", "cpu-tiny", "--served-model-name", MODEL)
SETTINGS += ("--enable-scale-out", "--max-num-queued-reqs", "256")  # a test sends 200 at once
SETTINGS += ("--max-body-bytes", str(2**27))  # a test sends 66 MB, to be refused by vLLM
ENVIRONMENT = {"VLLM_ENABLE_RESPONSES_API_STORE": "1", "VLLM_ENABLE_COHERE_API": "1"}
ENVIRONMENT["VLLM_SERVER_DEV_MODE"] = "1"  # for /reset_prefix_cache
WINDOW = 8192  # tokens, as most of the tests have it
WINDOWS = {"serve/instrumentator/test_basic.py": 10_100}  # files that need another one
READY_S = 180
DIRECT, GATEWAY = "direct", "gateway"
FOLDER = "tests/entrypoints"
FILES = (
    "anthropic/test_messages.py",
    "cohere/test_chat_v2.py",
    "generate/generative_scoring/test_generative_scoring_e2e.py",
    "openai/chat_completion/test_batched_chat_completions.py",
    "openai/chat_completion/test_chat.py",
    "openai/chat_completion/test_chat_completion.py",
    "openai/chat_completion/test_chat_echo.py",
    "openai/chat_completion/test_chat_logit_bias_validation.py",
    "openai/chat_completion/test_completion_with_function_calling.py",
    "openai/chat_completion/test_include_reasoning.py",
    "openai/chat_completion/test_logprob_token_ids.py",
    "openai/completion/test_completion.py",
    "openai/completion/test_prompt_validation.py",
    "openai/responses/test_basic.py",
    "openai/responses/test_function_call.py",
    "openai/responses/test_simple.py",
    "openai/responses/test_stateful.py",
    "openai/test_chunked_prompt.py",
    "openai/test_return_token_ids.py",
    "openai/test_return_tokens_as_ids.py",
    "scale_out/render/test_launch_render.py",
    "scale_out/render/test_render.py",
    "scale_out/derender/test_derender.py",
    "scale_out/derender/test_derender_parity.py",
    "scale_out/token_in_token_out/test_serving_tokens.py",
    "serve/instrumentator/test_basic.py",
    "serve/instrumentator/test_metrics.py",
    "serve/instrumentator/test_orca_metrics.py",
    "serve/tokenize/test_tokenization.py",
)
# Left out, by how their names begin; why.
REFUSED = "asks for logprob_token_ids, which are refused where there is speculation"
FLAG = "needs a flag of vLLM that no profile sets"
LONG = "asks without a bound, and when the tiny model ends by itself is chance"
RIGHT = "asks for a right answer, or one of JSON to its end, which the tiny model does not give"
TOOLS = "only a model that calls tools of its own will can pass"
DESELECTED = {
    "anthropic/test_messages.py::test_anthropic_structured_output": RIGHT,
    "anthropic/test_messages.py::test_anthropic_tool_call": TOOLS,
    "anthropic/test_messages.py::test_simple_messages": LONG,
    "anthropic/test_messages.py::test_system_message": LONG,
    "generate/generative_scoring/test_generative_scoring_e2e.py::TestGenerativeScoringAPI"
    "::test_score_consistency": REFUSED,
    "openai/chat_completion/test_logprob_token_ids.py": REFUSED,
    "openai/chat_completion/test_batched_chat_completions.py"
    "::test_batched_chat_completions_logprob": REFUSED,
    "openai/chat_completion/test_batched_chat_completions.py::test_batched_chat_completions[": LONG,
    "openai/chat_completion/test_batched_chat_completions.py"
    "::test_batched_chat_completions_with_json_schema": LONG,
    "openai/chat_completion/test_batched_chat_completions.py"
    "::test_batched_chat_completions_return_tokens": LONG,
    "openai/chat_completion/test_completion_with_function_calling.py::test_named_tool_use": RIGHT,
    "openai/chat_completion/test_chat.py::test_complex_message_content": RIGHT,
    "openai/chat_completion/test_chat.py::test_more_than_one_prompt_logprobs_chat": LONG,
    "openai/chat_completion/test_chat.py::test_prompt_logprobs_chat": LONG,
    "openai/chat_completion/test_chat.py::test_response_format_json": RIGHT,
    "openai/chat_completion/test_chat.py::test_structured_outputs_json_chat": RIGHT,
    "openai/chat_completion/test_chat_echo.py::test_chat_session_with_echo": LONG,
    "openai/responses/test_basic.py::test_chat": RIGHT,
    "openai/responses/test_basic.py::test_instructions": RIGHT,
    "openai/responses/test_basic.py::test_simple_input": RIGHT,
    "openai/responses/test_function_call.py::test_function_calling_with_streaming": TOOLS,
    "openai/responses/test_function_call.py::test_function_tool_use": TOOLS,
    "openai/responses/test_function_call.py::test_named_tool_use": RIGHT,
    "openai/responses/test_stateful.py::test_previous_response_id": RIGHT,
    "openai/responses/test_stateful.py::test_two_responses_with_same_prev_id": RIGHT,
    "serve/instrumentator/test_basic.py::test_server_load": FLAG,
    "serve/instrumentator/test_orca_metrics.py::test_chat_completion_with_orca_header": LONG,
    "serve/instrumentator/test_metrics.py::test_metrics_counts": "needs a server that is new",
    "serve/tokenize/test_tokenization.py::test_tokenizer_info": FLAG,
}
# Left out, by a word in their names.
WORDS = {
    "lora": "asks an adapter, which the server has not",
    "multimodal": "asks a model that sees",
    "chunked-prefill": "is one that runs already, for a server with another flag",
    "show-hidden-metrics": "is one that runs already, for a server with another flag",
}
THEIR_MODELS = re.compile(
    r"""(["'])(?:
    Qwen/Qwen[^"']+|HuggingFaceH4/zephyr-7b-beta|HuggingFaceTB/SmolLM2[^"']+|facebook/opt-125m
    |TinyLlama/TinyLlama-1.1B-Chat-v1.0|deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
    |hmellor/tiny-random-LlamaForCausalLM|(?:openai-community/)?gpt2
    |claude-3-7-sonnet-latest|command-r-plus-08-2024
    )\1""",
    re.VERBOSE,
)


# ------------------------------------------------------------------------------------- judging


def compare(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each test, with the outcome of each way.

    None: it did not run there; after one that was late directly there is nothing to lose.
    """
    rows: dict[str, dict[str, Any]] = {}
    for report in reports:
        test = report["test"].removeprefix(f"{FOLDER}/")
        row = rows.setdefault(test, {"test": test, DIRECT: None, GATEWAY: None, "why": {}})
        row[report["way"]] = report["outcome"]
        if report["why"]:
            row["why"][report["way"]] = report["why"]
    return [rows[test] for test in sorted(rows)]


def lost(rows: list[dict[str, Any]]) -> list[str]:
    """Tests that pass directly and not through the gateway."""
    return [row["test"] for row in rows if row[DIRECT] == "passed" != row[GATEWAY]]


def read_reports(path: Path) -> list[dict[str, Any]]:
    """What the plugin wrote: {test, way, outcome, why}, without this machine's paths.

    Raises:
        RuntimeError: a file of tests could not be read.
    """
    text = path.read_text(encoding="utf-8")
    for folder in (path.parent, ROOT):
        text = text.replace(f"{folder}/", "")
    reports = [json.loads(line) for line in text.splitlines()]
    for report in reports:
        if "collect" in report:
            raise RuntimeError(f"{report['collect']} cannot be collected: {report['why']}")
    return reports


def render(body: dict[str, Any]) -> str:
    """One screen: a line for each file, what differs, where it comes from."""
    counts: dict[str, dict[str, collections.Counter[str]]] = {}
    for row in body["tests"]:
        file = counts.setdefault(row["test"].partition("::")[0], {})
        for way in (DIRECT, GATEWAY):
            file.setdefault(way, collections.Counter()).update([row[way]] if row[way] else [])
    total: dict[str, collections.Counter[str]] = {
        way: collections.Counter() for way in (DIRECT, GATEWAY)
    }
    for file in counts.values():
        for way, counter in file.items():
            total[way].update(counter)
    lines = [
        f"vLLM {body['vllm']}'s own API tests, tiny model on a CPU: passed of those that ran, past",
        "the gateway and through it. Reasons of those that did not pass: `.json` beside this.",
        "",
        "| file | direct | gateway |",
        "|---|--:|--:|",
    ]
    for name, ways in [*counts.items(), ("**all**", total)]:
        cells = [f"{ways[w]['passed']} of {ways[w].total()}" for w in (DIRECT, GATEWAY)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    differ = [row for row in body["tests"] if row[DIRECT] != row[GATEWAY]]
    lines.append("")
    lines += [f"- {r['test']}: direct {r[DIRECT]}, gateway {r[GATEWAY]}" for r in differ]
    if not differ:
        lines.append("Every test has the same outcome both ways.")
    lines += ["", f"{body['at']}, commit {body['commit']}", "", f"`{body['command']}`"]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------ their tests


def copy_tests(source: Path, folder: Path, files: Sequence[str]) -> None:
    """The tests that a run needs, with our model's name in the place of theirs.

    Raises:
        ValueError: no source distribution of vLLM, or a file of the list that it lacks.
    """
    if source.is_file():
        with tarfile.open(source) as archive:
            archive.extractall(folder / "source", filter="data")
        [source] = (folder / "source").iterdir()
    if not (source / FOLDER).is_dir():
        raise ValueError(f"{source} has no {FOLDER}: not vLLM's source distribution")
    for name in ("tests", "examples"):  # of the examples, chat templates
        shutil.copytree(source / name, folder / name)
    for name in files:
        path = folder / FOLDER / name
        if not path.is_file():
            raise ValueError(f"{source} has no {FOLDER}/{name}")
    fixtures = folder.glob(f"{FOLDER}/**/conftest.py")
    for path in {*(folder / FOLDER / name for name in files), *fixtures}:
        text = path.read_text(encoding="utf-8")
        path.write_text(THEIR_MODELS.sub(f'"{MODEL}"', text), encoding="utf-8")


def run_tests(
    folder: Path, urls: dict[str, str], files: Sequence[str], limit_s: float, end: float = math.inf
) -> list[dict[str, Any]]:
    """Reports of each test and way; progress goes to standard output."""
    out = folder / "reports"
    out.write_text("", encoding="utf-8")
    environment = os.environ | {
        "API_TESTS_URLS": json.dumps(urls),
        "API_TESTS_OUT": str(out),
        "API_TESTS_LIMIT_S": str(limit_s),
        "API_TESTS_END": str(end),
        "PYTHONPATH": f"{folder}{os.pathsep}{Path(__file__).parent}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "vllm_api_plugin", "-p", "no:terminal"]
    command += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", folder]
    command += ["--anyio-mode", "auto", *(f"--deselect={FOLDER}/{name}" for name in DESELECTED)]
    command += ["-k", " and ".join(f"not {word}" for word in WORDS)]
    command += [folder / FOLDER / name for name in files]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    reports = read_reports(out)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with status {done.returncode}")
    return reports


# -------------------------------------------------------------------------------------- servers


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Until it answers 200."""
    deadline = time.monotonic() + READY_S
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(url, timeout=10),
        ):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{url} does not answer 200 within {READY_S} s")
        time.sleep(0.2)


@contextlib.contextmanager
def servers(log: Path, window: int) -> Iterator[dict[str, str]]:
    """The gateway with its engine, and the copier beside it. Yields the URL of each way."""
    ports = {DIRECT: free_port(), GATEWAY: free_port()}
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    serve = [sys.executable, "-m", "serve", "run", *SETTINGS]
    serve += ["--max-model-len", str(window), "--port", str(ports[GATEWAY])]
    serve += ["--load-record", str(log.resolve().with_name("load.json"))]
    copier = [sys.executable, "-m", "serve.overhead", "--part", "copier"]
    copier += ["--port", str(ports[DIRECT])]
    copier += ["--uds", str(run_path(f"engine-{ports[GATEWAY]}.sock"))]
    with log.open("ab") as output:
        started = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for command in (serve, copier)
        ]
    try:
        wait_for(f"{urls[GATEWAY]}/readyz", started[0])
        wait_for(f"{urls[DIRECT]}/health", started[1])
        yield urls
        if started[0].poll() is not None:
            raise RuntimeError(f"the server ended with status {started[0].returncode}")
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(60)


def run_all(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Reports of all files, with a life of the server for each window."""
    reports = []
    end = time.time() + args.most_s
    windows = {name: WINDOWS.get(name, WINDOW) for name in args.files}
    for window in sorted(set(windows.values()), reverse=True):
        files = [name for name in args.files if windows[name] == window]
        with servers(args.log or folder / "log", window) as urls:
            reports += run_tests(folder, urls, files, args.limit_s, end)
    return reports


def sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vllm_api_tests", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--out", type=Path, required=True, help="without a suffix")
    parser.add_argument("--limit-s", type=float, default=60, help="of each test, one way")
    parser.add_argument("--most-s", type=float, default=math.inf, help="begin no test after that")
    parser.add_argument("--log", type=Path, help="gets the server's output")
    parser.add_argument("--files", nargs="+", default=FILES, help=f"below {FOLDER}")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            copy_tests(args.source, folder, args.files)
            rows = compare(run_all(folder, args))
    except (OSError, ValueError, RuntimeError, tarfile.TarError) as error:
        print(f"vllm_api_tests: {error}", file=sys.stderr)
        return 2
    versions = collect_versions()
    given = [Path(word).name if Path(word).is_absolute() else word for word in argv]
    body = {
        "schema_version": SCHEMA_VERSION,
        "command": shlex.join(["python", "scripts/vllm_api_tests.py", *given]),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": versions.commit,
        "vllm": versions.vllm,
        "source_sha256": sha256(args.source),
        "limit_s": args.limit_s,
        "deselected": DESELECTED | {f"*{word}*": why for word, why in WORDS.items()},
        "tests": rows,
        "lost": lost(rows),
    }
    Path(f"{args.out}.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    text = render(body)
    Path(f"{args.out}.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 1 if body["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
