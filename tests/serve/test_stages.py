"""Lines as the pinned vLLM prints them."""

import pytest

from serve.stages import Lines, Progress, Stage, read_line

SHARDS = "Loading safetensors checkpoint shards"


@pytest.mark.parametrize(
    ("line", "stage", "progress"),
    [
        (
            "(Worker pid=23466) INFO 11-24 16:48:51 [cpu_model_runner.py:68] Starting to load "
            "model /models/dsv4-tiny...",
            Stage.LOADING,
            None,
        ),
        (
            f"{SHARDS}:  50% Completed | 1/2 [00:00<00:00, 24.77it/s]",
            Stage.LOADING,
            Progress(1, 2, SHARDS),
        ),
        (
            f"(Worker_TP0 pid=9) {SHARDS}:   0% Completed | 0/46 [00:00<?, ?it/s]",
            Stage.LOADING,
            Progress(0, 46, SHARDS),
        ),
        (
            "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  45%|████▌     | 10/22 "
            "[00:01<00:01,  8.9it/s]",
            Stage.CAPTURING,
            Progress(10, 22, "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE)"),
        ),
        (
            "(EngineCore pid=5) INFO 11-24 16:48:53 [backends.py:1] Start compiling function <f>",
            Stage.COMPILING,
            None,
        ),
        (
            "(EngineCore pid=23382) INFO 11-24 16:48:53 [kv_cache_utils.py:2327] CPU KV cache "
            "size: 51,531 tokens, Maximum concurrency for 4,096 tokens per request: 12.58x",
            Stage.PREPARING,
            None,
        ),
        (
            "(APIServer pid=2) INFO 11-24 16:48:57 [entry.py:140] Starting vLLM server on unix:/s",
            Stage.LISTENING,
            None,
        ),
    ],
)
def test_a_line_shows_its_stage_and_progress(line, stage, progress):
    assert read_line(line) == (stage, progress)


def test_other_lines_show_none():
    assert read_line("INFO:     127.0.0.1:58242 - GET /health HTTP/1.1 200 OK") is None


def test_lines_end_at_carriage_returns_wherever_the_bytes_are_cut():
    lines = Lines()
    data = "a\rbar 1/2\rbar 2/2\n漢字\r\nrest".encode()
    seen = [line for byte in data for line in lines.feed(bytes([byte]))]
    assert seen == ["a", "bar 1/2", "bar 2/2", "漢字"]


def test_a_line_without_end_does_not_fill_the_memory():
    lines = Lines()
    for _ in range(100):
        lines.feed(b"x" * 10_000)
    assert len(lines.feed(b"\n")[0]) <= 8192
