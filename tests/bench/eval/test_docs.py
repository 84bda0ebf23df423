"""docs/eval.md names options that exist and figures that the code has."""

import re
from pathlib import Path

import pytest

from bench.eval import cli, config, parity, parity_judge, sandbox, stats, summary
from bench.eval.config import TaskName
from bench.eval.parity_run import ParityConfig
from tests.bench.eval.test_cli import make
from tests.bench.eval.test_extract import texts

PAGE = (Path(__file__).parents[3] / "docs" / "eval.md").read_text()
WORDS = " ".join(PAGE.split())
COMMANDS = re.findall(r"^make eval\b([^#\n]*)", PAGE, re.M)


@pytest.mark.parametrize("variables", COMMANDS)
def test_every_make_line_gives_arguments_that_are_read(variables):
    if "[" in variables:
        variables = variables.replace("[PROFILE=]", "PROFILE=cpu-tiny").translate(
            {ord(c): None for c in "[]"}
        )
    said = make(variables).stdout.replace("\\\n", "").split()
    arguments = cli.parser().parse_args(said[said.index("eval") + 1 :])
    assert (arguments.command == "parity") == ("PARITY" in variables)


def test_every_option_exists():
    known = cli.parser().format_help()
    for command in cli.COMMANDS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "200")
            known += command_help(command)
    for option in set(re.findall(r"`(--[a-z0-9-]+)", PAGE)):
        assert option in known, option


def command_help(name: str) -> str:
    (commands,) = [a for a in cli.parser()._actions if a.dest == "command"]
    return commands.choices[name].format_help()


def test_every_task_is_explained():
    for name in TaskName:
        assert f"`{name.value}`" in PAGE


def test_the_figures_are_those_of_the_code():
    three, five = (f"{stats.power(100, loss):.0%}".replace("%", " %") for loss in (0.03, 0.05))
    assert f"a loss of 3 points is found in {three} of comparisons, of 5 points in {five}" in WORDS
    seen = {n: f"{100 * stats.detectable_loss(n):g}" for n in (100, 164, 1000, 1319)}
    assert f"only {seen[100]} points in {stats.POWER:.0%}".replace("%", " %") in WORDS
    assert f"show a loss of {seen[1319]} points" in WORDS
    assert f"one of {seen[164]}, 1,000 of MMLU one of {seen[1000]}" in WORDS
    assert f"above {summary.MOST_SHARE:.0%}".replace("%", " %") in WORDS
    assert f"in at most {100 * stats.ALPHA / 2:g} % of comparisons, one-sided" in WORDS
    several = [f"{100 * k * stats.ALPHA / 2:g} %" for k in (4, 5)]
    assert f"{several[0]} of comparisons over the four default tasks, {several[1]} over" in WORDS
    assert f"p <= {parity_judge.ALPHA} in either" in WORDS
    assert f"{100 * parity_judge.QUANTILE:g} % of the gaps" in WORDS
    assert f"not among its {parity.BEST} best" in WORDS
    quiet = parity_judge.Excess.of(200, set(), set()).detectable
    assert f"200 prompts show an excess of {100 * quiet:g} points" in WORDS
    limits = sandbox.Limits()
    assert (
        f"{limits.disk_bytes >> 20} MiB of disk in memory, {limits.memory_bytes >> 20} MiB, "
        f"{limits.processes} processes, {limits.wall_s:g} s" in WORDS
    )
    default = ParityConfig(profile="x")
    assert (
        f"[NUM_PROMPTS={default.num_prompts}] [MAX_TOKENS={default.max_tokens}] "
        f"[STREAMS={default.streams}] [CONTROL_STREAMS={default.control_streams}]" in PAGE
    )
    count = sum(len(texts(kind)) for kind in ("number", "letter", "code"))
    assert f"tested on {count} texts" in WORDS
    assert f"{config.QUICK_ITEMS} items of each" in WORDS
    assert f"of MMLU {config.DEFAULT_MMLU_ITEMS:,}" in WORDS
    assert f"| {config.MAX_TOKENS['on']:,}; with `off` {config.MAX_TOKENS['off']:,} |" in WORDS
