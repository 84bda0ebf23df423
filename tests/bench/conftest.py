import json

import pytest


@pytest.fixture
def model(tmp_path):
    """A checkpoint's folder, which the fakes do not look into."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def prompts(tmp_path):
    """A file of five prompts."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{i}", "text": f"text {i}"} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
