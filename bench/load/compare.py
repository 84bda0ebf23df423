"""`python -m bench compare BASE HEAD`: the same cells of two results, and whether one got worse.

Repeat i of both asked the same text, so repeats are resampled in pairs. A figure has regressed
when it is worse by more than the bound and its whole interval is on the worse side of no change.
Where the interval is not, the loss is not shown: one slow repeat of five can do that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench import metrics
from bench.load import intervals, markdown, result
from bench.load.errors import LoadError
from bench.load.intervals import LEAST_FOR_INTERVAL, Estimate
from bench.load.server import differing, lasting
from bench.load.sizes import format_size

# name, whether more is better, whether a regression of it fails
FIGURES = (
    ("ttft_ms", False, True),
    ("tpot_ms", False, True),
    ("output_throughput", True, True),
    ("prefill_tok_s", True, False),
    ("decode_tok_s", True, False),
)
SAME = ("output", "mode", "api", "text", "seed")
DEFAULT_BOUND = 0.03


@dataclass(frozen=True)
class Change:
    """One figure of one cell, over the repeats that both measured. ratio: head over base.

    not_shown: worse by more than the bound, and more repeats must say whether by chance.
    """

    cell: str
    figure: str
    base: float
    head: float
    ratio: Estimate
    worse_by: float
    regressed: bool
    not_shown: bool

    @property
    def verdict(self) -> str:
        """In a word, for the table."""
        return "**regressed**" if self.regressed else "worse, not shown" if self.not_shown else ""


def compare(base: dict[str, Any], head: dict[str, Any], bound: float) -> list[Change]:
    """Every figure that both have.

    Args:
        bound: share by which a figure may be worse.
    Raises:
        LoadError: another workload, other cells, problems in either, or too few repeats.
    """
    if bound < 0:
        raise LoadError(f"bound = {bound}; must be at least 0")
    check_comparable(base, head)
    others = {_key(cell): cell for cell in head["cells"]}
    changes = []
    for cell in base["cells"]:
        changes += _changes(cell, others[_key(cell)], bound)
    return changes


def check_comparable(base: dict[str, Any], head: dict[str, Any]) -> None:
    """Refuse results that cannot show a regression.

    Raises:
        LoadError: another workload, problems in either, or too few repeats.
    """
    check_same_workload(base, head)
    for which, one in (("base", base), ("head", head)):
        if found := result.problems(one):
            raise LoadError(f"compare: {which} is not to be believed: {'; '.join(found)}")
    for cell in (*base["cells"], *head["cells"]):
        if cell["num_repeats"] < LEAST_FOR_INTERVAL:
            raise LoadError(
                f"compare: {cell['num_repeats']} repeats; at least {LEAST_FOR_INTERVAL} are needed"
            )


def check_same_workload(base: dict[str, Any], head: dict[str, Any]) -> None:
    """Refuse to set one thing beside another.

    Raises:
        LoadError: says what differs.
    """
    for name in SAME:
        a, b = base["config"][name], head["config"][name]
        if a != b:
            raise LoadError(f"compare: {name} is {a} in one and {b} in the other")
    keys = [{_key(cell) for cell in one["cells"]} for one in (base, head)]
    if keys[0] != keys[1]:
        apart = sorted(keys[0] ^ keys[1])
        raise LoadError(f"compare: (context, depth, streams) {apart} are in one result only")


def notes(base: dict[str, Any], head: dict[str, Any]) -> list[str]:
    """What else differs between the two, for the reader to judge."""
    found = [
        f"{name} differs: {_shown(a)} in base, {_shown(b)} in head"
        for name, a, b in differing(_conditions(base), _conditions(head))
    ]
    if base["provenance"]["gpus"] != head["provenance"]["gpus"]:
        found.append("gpus differs")
    if base["provenance"]["date"][:10] != head["provenance"]["date"][:10]:
        found.append("not measured on one day")
    return found


def _conditions(one: dict[str, Any]) -> dict[str, Any]:
    """What may explain a change, by name; of speculation what the cells saw."""
    counts = {(c["acceptance"] or {}).get("num_speculative_tokens", 0) for c in one["cells"]}
    names = ("commit", "device", "series_sha256", "checkpoint_sha256", "checkpoint_index_sha256")
    return (
        lasting(one["server"])
        | {"num_speculative_tokens": ", ".join(sorted(map(str, counts)))}
        | {name: one["provenance"][name] for name in names}
    )


def _shown(value: Any) -> str:
    """A hash by its beginning."""
    text = str(value)
    return text[:12] if len(text) >= 40 and " " not in text else text


def table(changes: list[Change]) -> str:
    """Markdown, a row for each figure."""
    head = ["depth x streams", "figure", "base", "head", "change", "95 % interval", ""]
    rows = []
    for c in changes:
        interval = "-"
        if c.ratio.low is not None and c.ratio.high is not None:
            interval = f"{c.ratio.low - 1:+.1%} to {c.ratio.high - 1:+.1%}"
        rows.append(
            [c.cell, c.figure, f"{c.base:,.2f}", f"{c.head:,.2f}", f"{c.ratio.value - 1:+.1%}"]
            + [interval, c.verdict]
        )
    return markdown.table(head, rows)


def _key(cell: dict[str, Any]) -> tuple[int, int, int]:
    return cell["context"], cell["depth"], cell["max_concurrency"]


def _changes(base: dict[str, Any], head: dict[str, Any], bound: float) -> list[Change]:
    name = f"{format_size(base['depth'])} x {base['max_concurrency']}"
    size = min(base["num_repeats"], head["num_repeats"])
    found = []
    for figure, more_is_better, gates in FIGURES:
        values = [[r[figure] for r in cell["repeats"][:size]] for cell in (base, head)]
        ratio = intervals.ratio_of_medians(*values)
        if ratio is None:
            continue
        worse_by = (1 / ratio.value if more_is_better else ratio.value) - 1
        over = gates and worse_by > bound
        whole = ratio.high if more_is_better else ratio.low
        clearly = whole is not None and (whole < 1 if more_is_better else whole > 1)
        both = [pair for pair in zip(*values, strict=True) if None not in pair]
        medians = [metrics.median(side) for side in zip(*both, strict=True)]
        found.append(
            Change(name, figure, *medians, ratio, worse_by, over and clearly, over and not clearly)
        )
    return found
