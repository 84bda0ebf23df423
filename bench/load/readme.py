"""`python -m bench report`: the tables of README and docs, built from the files in `results/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.load import markdown, result
from bench.load.errors import LoadError

BEGIN, END = "<!-- bench report: begin -->", "<!-- bench report: end -->"


def load_results(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every load result with its file's name, in the order of dates; other files are passed over.

    Raises:
        LoadError: no such folder, or a load result of another schema version.
    """
    if not folder.is_dir():
        raise LoadError(f"{folder}: no such folder")
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            kind = json.loads(path.read_text(encoding="utf-8")).get("kind")
        except (ValueError, AttributeError):
            continue
        if kind == result.KIND:
            found.append((path.name, result.read(path)))
    return sorted(found, key=lambda pair: pair[1]["provenance"]["date"])


def render(results: list[tuple[str, dict[str, Any]]]) -> str:
    """A table for each result that can be believed, with its file. Others are named below."""
    parts, refused = [], []
    for name, one in results:
        if result.problems(one):
            refused.append(f"`{name}`")
            continue
        table = markdown.table(*markdown.cells_table(one))
        where = f"{markdown.provenance_line(one)} (`results/{name}`)"
        parts += [f"**{markdown.title(one)}**", table, where]
    if parts:
        parts.append(markdown.NOTE)
    if refused:
        parts.append(f"Left out, with problems: {', '.join(refused)}")
    return "\n\n".join(parts) or "No load result yet."


def replace_between_marks(path: Path, text: str) -> None:
    """Put the text between the two marks of a file.

    Raises:
        LoadError: the file has not each mark once, in order.
    """
    try:
        whole = path.read_text(encoding="utf-8")
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}") from error
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(BEGIN) > whole.index(END):
        raise LoadError(f"{path}: must have {BEGIN} and then {END}, each once")
    before, after = whole[: whole.index(BEGIN)], whole[whole.index(END) :]
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(f"{before}{BEGIN}\n{text}\n{after}", encoding="utf-8")
    temporary.replace(path)
