"""`python -m bench report`: the tables of README and docs, built from the files in `results/`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import report
from bench.load import markdown, result, speculative
from bench.load.errors import LoadError, Stale

Named = Sequence[tuple[str, dict[str, Any]]]  # a file's name, and what it holds
BASE_SUFFIX = "-no-mtp.json"  # of the arm without MTP of --compare-speculative


def marks(section: str) -> tuple[str, str]:
    """What stands before and after a section's tables in a page."""
    return f"<!-- bench report {section}: begin -->", f"<!-- bench report {section}: end -->"


def load_results(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every load result with its file's name, in the order of dates; other files are passed over.

    Raises:
        LoadError: no such folder, or a load result of another schema version.
    """
    found = [
        (path.name, result.read(path)) for path, one in _records(folder) if _kind(one) == "load"
    ]
    return sorted(found, key=lambda pair: pair[1]["provenance"]["date"])


def render(results: Named) -> str:
    """A table for each result that can be believed, with its file. Others are named below.

    The arms of one --compare-speculative are the reference table.
    """
    parts = []
    refused = [f"`{name}`" for name, one in results if result.problems(one)]
    good = {name: one for name, one in results if not result.problems(one)}
    cells = False
    for name, one in good.items():
        if _base_of(name) in good:
            continue  # is a row of its base's table
        stem = name.removesuffix(BASE_SUFFIX)
        others = {n: r for n, r in good.items() if _base_of(n) == name}
        if others:
            profile = one["label"].removesuffix("-no-mtp")
            rows = speculative.rows(profile, [one, *others.values()])
            parts += [f"**{profile}: with and without MTP**"]
            parts += [markdown.table(speculative.HEAD, rows), speculative.NOTE]
            files = f"`results/{stem}-*.json`"
        else:
            parts += [f"**{markdown.title(one)}**", markdown.table(*markdown.cells_table(one))]
            files, cells = f"`results/{name}`", True
        parts.append(f"{markdown.provenance_line(one)} ({files})")
    if cells:
        parts.append(markdown.NOTE)
    if refused:
        parts.append(f"Left out, with problems: {', '.join(refused)}")
    return "\n\n".join(parts) or "No load result yet."


def render_demo(folder: Path) -> str:
    """The newest result of `make demo`."""
    name, newest = _newest(folder, "demo-*.json")
    columns = [("profile", "name", "{}"), *report.COLUMNS]
    rows = [
        ["-" if p[key] is None else form.format(p[key]) for _, key, form in columns]
        for p in newest["profiles"]
    ]
    return f"{markdown.table([title for title, _, _ in columns], rows)}\n\n`results/{name}`"


def render_kernels(folder: Path) -> str:
    """The newest kernel timings on an H100, where our kernels serve."""
    name, newest = _newest(folder, "kernels-h100-*.json")
    rows = [
        [f"{case['tokens']}", f"{case['arms']['ours']['us']:.1f}"]
        + [f"{case['arms']['marlin']['us']:.1f}", f"{case['ratios']['marlin']['ratio']:.2f}"]
        + [f"{case['arms']['ours']['share_of_copy']:.0%}".replace("%", " %")]
        for case in newest["cases"]
        if case["routing"] == "uniform" and case["serves"] == "ours"
    ]
    head = ["tokens", "ours, us", "vLLM's Marlin, us", "x", "share of copy bandwidth"]
    return f"{markdown.table(head, rows)}\n\n`results/{name}`"


SECTIONS = {
    "load": lambda folder: render(load_results(folder)),
    "demo": render_demo,
    "kernels": render_kernels,
}


def write(page: Path, folder: Path) -> None:
    """Put the tables of today's results between the marks of a page.

    Raises:
        LoadError: see `filled`.
    """
    text = filled(page, folder)
    temporary = page.with_name(f".{page.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(page)


def check(page: Path, folder: Path) -> None:
    """Compare a page with today's results.

    Raises:
        LoadError: see `filled`.
        Stale: it has other tables.
    """
    if filled(page, folder) != page.read_text(encoding="utf-8"):
        raise Stale(f"{page}: its tables are not those of {folder}; run `make report`")


def filled(page: Path, folder: Path) -> str:
    """The page's text with every section that it has marks of.

    Raises:
        LoadError: no such page, no marks, or marks that are not each there once, in order.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise LoadError(f"{page}: {error.strerror}") from error
    found = 0
    for section, make in SECTIONS.items():
        begin, end = marks(section)
        counts = text.count(begin), text.count(end)
        if counts == (0, 0):
            continue
        if counts != (1, 1) or text.index(begin) > text.index(end):
            raise LoadError(f"{page}: must have {begin} and then {end}, each once")
        found += 1
        before, after = text[: text.index(begin)], text[text.index(end) :]
        text = f"{before}{begin}\n{make(folder)}\n{after}"
    if not found:
        raise LoadError(f"{page}: has no marks, for example {marks('load')[0]}")
    return text


def _base_of(name: str) -> str | None:
    """The file of the arm without MTP that belongs to one with it."""
    stem, mark, _ = name.rpartition("-mtp")
    return stem + BASE_SUFFIX if mark and not name.endswith(BASE_SUFFIX) else None


def _records(folder: Path) -> list[tuple[Path, Any]]:
    if not folder.is_dir():
        raise LoadError(f"{folder}: no such folder")
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append((path, json.loads(path.read_text(encoding="utf-8"))))
        except ValueError:
            continue
    return found


def _kind(record: Any) -> str | None:
    return record.get("kind") if isinstance(record, dict) else None


def _newest(folder: Path, pattern: str) -> tuple[str, dict[str, Any]]:
    """By the date in the record, then by name: days may be all that differ."""
    found = [(path.name, one) for path, one in _records(folder) if path.match(pattern)]
    if not found:
        raise LoadError(f"{folder}: no {pattern}")
    return max(found, key=lambda pair: (pair[1]["provenance"].get("date") or "", pair[0]))
