"""`serve doctor`: run the checks, print the table or JSON, return the exit status."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serve.allreduce_tier import FILE_NAME, Known, keep, load
from serve.doctor.checks import Area, Finding, Level, Target, check_machine, has_gpu
from serve.doctor.machine import Machine, RecordedMachine
from serve.environment import cache_path, our_variables, read_env_file
from serve.errors import ConfigError
from serve.profiles import Device
from serve.settings import add_env_file, all_settings, resolve

SCHEMA_VERSION = 1
CPU_PROFILE, GPU_PROFILE = "cpu-tiny", "524k"
FLAGS = ("profile", "model", "host", "port", "allreduce")  # settings of `serve run`
WIDTH = 100
EXIT = {
    Area.GPU: 10,
    Area.DRIVER: 11,
    Area.LINK: 12,
    Area.PEER: 13,
    Area.HOST: 14,
    Area.ENGINE: 15,
    Area.CHECKPOINT: 16,
}


def exit_status(findings: list[Finding]) -> int:
    """That of the first fault; without one, of the first warning; 0 when there is neither.

    First in the order of EXIT: what comes later often follows from it.
    """
    for level in (Level.FAULT, Level.WARNING):
        areas = {finding.area for finding in findings if finding.level is level}
        if areas:
            return min(EXIT[area] for area in areas)
    return 0


def table(target: Target, findings: list[Finding], status: int) -> str:
    """One line for each finding, and under it what its owner can do."""
    width = max(len(finding.check) for finding in findings)
    lines = [f"serve doctor: profile {target.profile.name}, checkpoint {target.model}"]
    for finding in findings:
        head = f"{finding.check:<{width}}  {finding.level.value:<7}  "
        lines += textwrap.wrap(
            head + finding.value, WIDTH, subsequent_indent=" " * len(head), break_on_hyphens=False
        )
        if finding.advice:
            indent = " " * (width + 2)
            lines += textwrap.wrap(
                finding.advice, WIDTH, initial_indent=f"{indent}-> ",
                subsequent_indent=f"{indent}   ", break_on_hyphens=False, break_long_words=False,
            )  # fmt: skip
    counts = [
        f"{len(found)} {level.value}{'s' if len(found) > 1 else ''}"
        for level in (Level.FAULT, Level.WARNING)
        if (found := [f for f in findings if f.level is level])
    ]
    said = " and ".join(counts) or "nothing to put right"
    if target.profile.device is Device.CPU and not counts:
        said += f"; the profile {target.profile.name} fits this machine"
    return "\n".join([*lines, f"{said}; exit status {status}"])


def as_json(target: Target, findings: list[Finding], status: int) -> dict[str, Any]:
    """The same for programs."""
    return {
        "schema_version": SCHEMA_VERSION,
        "profile": target.profile.name,
        "model": str(target.model),
        "exit_status": status,
        "findings": [asdict(finding) for finding in findings],
    }


def make_target(arguments: argparse.Namespace, machine: Machine) -> Target:
    """What `serve run` would run here; of a recording, what the flags say.

    Where nothing names a profile it is the one that fits the kind of machine.

    Raises:
        ConfigError: no such profile, or a setting that `serve run` refuses too.
    """
    here = arguments.machine is None
    file = read_env_file(arguments.env_file) if here else {}
    variables = our_variables() if here else {}
    flags = {name: getattr(arguments, name) for name in FLAGS}
    if not flags["profile"] and all_settings()["profile"].variable not in variables | file:
        flags["profile"] = GPU_PROFILE if has_gpu(machine) else CPU_PROFILE
    settings = resolve(flags, variables, file)
    return Target(
        settings.profile,
        settings.model,
        settings["host"],
        settings["port"],
        settings["allreduce"],
        arguments.probe,
        arguments.verify,
        lambda known: keep_verdict(known) if here else None,
    )


def keep_verdict(known: Known) -> None:
    """Have `serve run` take what the probe found just now, and forget no demotion."""
    path = cache_path(FILE_NAME)
    before = load(path, known.key, tell)
    keep(path, Known(known.key, known.result, before.demotions), tell)


def tell(text: str) -> None:
    """What is done, while it is done."""
    print(f"doctor: {text}", file=sys.stderr, flush=True)


def run_doctor(arguments: argparse.Namespace) -> int:
    """target -> checks -> table or JSON -> exit status."""
    if arguments.machine is not None and arguments.record is not None:
        raise ConfigError("--machine, --record: a recording is not recorded again")
    if arguments.machine is not None:
        machine: Machine = RecordedMachine(arguments.machine)
    else:
        machine = Machine(record=arguments.record is not None)
    target = make_target(arguments, machine)
    findings = list(check_machine(machine, target, tell))
    status = exit_status(findings)
    if arguments.record is not None:
        machine.save(arguments.record)
    if arguments.json:
        print(json.dumps(as_json(target, findings, status), indent=1))
    else:
        print(table(target, findings, status))
    return status


def add_doctor(commands: Any) -> None:
    """The command line of `serve doctor`."""
    parser = commands.add_parser(
        "doctor", help="what of this machine keeps the model from running, or from speed"
    )
    known = all_settings()
    for name in FLAGS:
        parser.add_argument(known[name].flag, metavar="X", help=known[name].help)
    add_env_file(parser)
    parser.add_argument("--no-probe", dest="probe", action="store_false", help="leave it out")
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not look into the checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="for other programs")
    parser.add_argument("--record", type=Path, metavar="FILE", help="keep all that was read")
    parser.add_argument("--machine", type=Path, metavar="FILE", help="judge such a recording")
