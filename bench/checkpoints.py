"""The way of an MTP head, lost and put back: original, base, RTN, GPTQ.

original ── quantize-base ──> base (no head) ── mtp --rtn ──> rtn ── serve, capture ──> rows
                                └──────────────── mtp --calibration rows ──> gptq ── verify
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.launch import Launcher, Retrofit, Service

STEPS = 6


@dataclass(frozen=True)
class RetrofitPlan:
    """Where everything goes. calibration_*: what `capture` asks the server for."""

    source: Path
    output: Path
    profile: str
    num_prompts: int
    max_tokens: int
    start_timeout_s: float

    @property
    def folder(self) -> Path:
        return self.output / "checkpoints"

    @property
    def calibration(self) -> Path:
        return self.output / "calibration"


def make_checkpoints(
    plan: RetrofitPlan, launch: Launcher, retrofit: Retrofit, say: Callable[[str], None]
) -> dict[str, Path]:
    """Walk the way from the source; returns name -> folder. What an earlier walk left is replaced.

    Raises:
        StepError, ServerError: a step failed; carries the end of its log.
    """
    for folder in (plan.folder, plan.calibration):
        if folder.exists():
            shutil.rmtree(folder)
    paths = {name: plan.folder / name for name in ("original", "base", "rtn", "gptq")}
    original, base, rtn, gptq = (str(path) for path in paths.values())
    copy_folder(plan.source, paths["original"])
    steps = _Steps(plan.output, retrofit, say)
    steps.run("the original without its MTP head, W4A16", "quantize-base", original, base)
    steps.run("a head rounded to nearest", "mtp", original, base, rtn, "--rtn")
    steps.next("the server with that head, to capture what its experts see")
    service = Service(
        plan.profile, paths["rtn"], 1, plan.output / "capture-server.log", plan.start_timeout_s,
        plan.calibration,
    )  # fmt: skip
    start = time.monotonic()
    with launch(service) as url:
        say(f"  up after {time.monotonic() - start:.0f} s")
        rows = ["--url", url, "--out", str(plan.calibration)]
        counts = ["--num-prompts", str(plan.num_prompts), "--max-tokens", str(plan.max_tokens)]
        steps.run("calibration rows", "capture", *rows, *counts)
    calibration = ["--calibration", str(plan.calibration)]
    steps.run("the head with GPTQ", "mtp", original, base, gptq, *calibration)
    steps.run("is it sound?", "verify", gptq, "--deep", original)
    return paths


def copy_folder(source: Path, target: Path) -> None:
    """Copy to a temporary name, then rename."""
    temporary = target.with_name(f".{target.name}.part")
    if temporary.exists():
        shutil.rmtree(temporary)
    shutil.copytree(source, temporary)
    temporary.replace(target)


class _Steps:
    """Numbers the steps and runs the commands among them."""

    def __init__(self, output: Path, retrofit: Retrofit, say: Callable[[str], None]) -> None:
        self.output, self.retrofit, self.say = output, retrofit, say
        self.number = 0

    def next(self, what: str) -> None:
        self.number += 1
        self.say(f"step {self.number}/{STEPS}: {what}")

    def run(self, what: str, *arguments: str) -> None:
        self.next(f"{what} (retrofit {arguments[0]})")
        log = self.output / f"{self.number}-{arguments[0]}.log"
        said = self.retrofit(list(arguments), log, self.say)
        self.say(f"  {said.replace(f'{self.output}/', '')}")
