"""docs/serve.md says what is there."""

from pathlib import Path

from serve.gateway import OWN_PATHS
from serve.settings import OWN
from serve.stages import Stage

TEXT = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")


def test_each_setting_is_named_with_its_default():
    rows = [line for line in TEXT.splitlines() if line.startswith("| `")]
    for setting in OWN:
        [row] = [row for row in rows if f"`{setting.name}`" in row.split("|")[1]]
        if isinstance(setting.default, (int, float)):
            assert f"{setting.default:.9g}" in row


def test_each_path_and_stage_is_named():
    for path in OWN_PATHS:
        assert f"`{path}`" in TEXT
    words = " ".join(TEXT.split())
    for stage in Stage:
        assert stage.value in words
