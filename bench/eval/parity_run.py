"""`python -m bench eval parity`: two servers that run, or a profile that is started twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from bench import provenance
from bench.eval import parity, parity_judge, result
from bench.eval.markdown import percent
from bench.eval.parity import Control, Speculative
from bench.load import html, origin
from bench.load import result as load_result
from bench.load.errors import LoadError
from bench.load.markdown import provenance_line, table
from bench.load.origin import REPOSITORY
from bench.load.progress import say
from bench.load.speculative import Arm, launch
from bench.load.svg import Series, chart
from bench.load.telemetry import Telemetry
from bench.measurement import Prompt, read_prompts
from bench.server import free_port

HEAD = ["against no MTP", "identical", "share", "part at a near-tie", "part at a clear token",
        "first part at token"]  # fmt: skip
TESTS_HEAD = ["more often with MTP?", "control", "MTP", "only MTP / only control",
              "p (one-sided)", "sees from"]  # fmt: skip
Launch = Callable[[Arm], AbstractContextManager[None]]


@dataclass(frozen=True)
class ParityConfig:
    """Two URLs, or a profile that is started without MTP and then with it.

    checkpoint, num_speculative_tokens: instead of the profile's. streams: prompts at once in the
    two runs that are compared; control_streams: in the control, best so many that its passes have
    as many rows as with MTP: streams x (1 + num_speculative_tokens).
    """

    off_url: str | None = None
    on_url: str | None = None
    profile: str | None = None
    checkpoint: Path | None = None
    num_speculative_tokens: int | None = None
    num_prompts: int = 200
    max_tokens: int = 128
    streams: int = 1
    control_streams: int = 2
    prompts: Path | None = None
    timeout_s: float = 1800.0
    start_timeout_s: float = 3600.0
    label: str | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("num_prompts", 1),
            ("max_tokens", 2),
            ("streams", 1),
            ("control_streams", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}; must be at least {least}")
        urls = (self.off_url is not None) + (self.on_url is not None)
        if urls == 1 or (urls == 0) == (self.profile is None):
            raise ValueError("parity needs --off-url and --on-url, or --profile")


def run(
    config: ParityConfig, output: Path, api_key: str | None = None, start: Launch = launch
) -> dict[str, Any]:
    """Ask both servers, write the result with its Markdown and HTML, print.

    Raises:
        LoadError, ServerError: bad input, no server.
        Unbelievable: the result is written, and shows no parity.
    """
    if output.exists():
        raise LoadError(f"{output}: exists; a result is written once")
    prompts = _prompts(config)
    with _serving(config, "no-mtp", config.off_url, 0, output, start) as url:
        control = asyncio.run(
            parity.ask_control(
                url, prompts, config.max_tokens, (config.streams, config.control_streams),
                config.timeout_s, api_key,
            )
        )  # fmt: skip
        telemetry = Telemetry.for_url(url)
        where = origin.collect(control.facts, url, telemetry)
    tokens = config.num_speculative_tokens
    with _serving(config, "mtp", config.on_url, tokens, output, start) as url:
        speculative = asyncio.run(
            parity.ask_speculative(
                url,
                prompts,
                config.max_tokens,
                config.streams,
                config.timeout_s,
                api_key,
                control.facts,
            )
        )
    found = assemble(config, prompts, control, speculative, where)
    load_result.write(output, found, result.PARITY_SCHEMA)
    text = render(found)
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    output.with_suffix(".html").write_text(page(found), encoding="utf-8")
    print(text)
    say(f"{output} written, and .md and .html beside it")
    parity_judge.check(found)
    return found


def assemble(
    config: ParityConfig, prompts: list[Prompt], control: Control, speculative: Speculative,
    where: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The result as it is written."""
    record = {k: provenance.recorded(v, REPOSITORY) for k, v in asdict(config).items()}
    urls = ("off_url", "on_url")
    record |= {k: provenance.without_user(record[k]) for k in urls if record[k]}
    return {
        "schema_version": result.SCHEMA_VERSION,
        "kind": result.PARITY_KIND,
        "label": config.label,
        "config": record,
        "servers": [control.facts.to_json(), speculative.facts.to_json()],
        "provenance": where,
        **parity_judge.judge(prompts, control, speculative),
    }


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The control and MTP."""
    streams, control = found["config"]["streams"], found["config"]["control_streams"]
    return [
        [
            name, f"{side['num_identical']} of {found['n']}", percent(side["share_identical"]),
            str(sum(p["near_tie"] for p in side["partings"])),
            str(sum(not p["near_tie"] for p in side["partings"])),
            str(min((p["position"] for p in side["partings"]), default="-")),
        ]
        for name, side in (
            (f"control: no MTP, {control} at once for {streams}", found["control"]),
            ("MTP", found["mtp"]),
        )
    ]  # fmt: skip


def tests(found: dict[str, Any]) -> list[list[str]]:
    """The two tests that decide."""
    return [
        [
            name, str(test["control"]), str(test["mtp"]),
            f"{test['mtp_only']} / {test['control_only']}", f"{test['p']:.3g}",
            "-" if test["detectable"] is None else f"{100 * test['detectable']:.1f} points",
        ]
        for name, test in (
            ("texts part", found["parted"]),
            ("texts part at a clear token", found["clear"]),
        )
    ]  # fmt: skip


def note(found: dict[str, Any]) -> str:
    """What the figures mean."""
    tokens, drafts, noise = found["config"]["max_tokens"], found["num_drafts"] or 0, found["noise"]
    return (
        f"Greedy answers of {tokens} tokens. Tested is whether MTP does more to the texts than "
        "the control, over the same prompts, by McNemar's exact test, one-sided; no parity at "
        f"p <= {found['alpha']}. An excess of the last column's share is found with 80 % "
        "probability, a smaller one less often. Near-tie: the two tokens are within "
        f"{noise['limit']:.4f} nats at the first run; any other token is clear. "
        f"{noise['quantile']:.0%} of the {noise['num_positions']:,} gaps between the two best "
        "tokens moved no more between the control's two runs (half of them no more than "
        f"{noise['median']:.4f}, one by {noise['largest']:.4f}). "
        f"{drafts:,} drafts, {found['num_accepted_tokens'] or 0:,} tokens accepted."
    )


def verdict(found: dict[str, Any]) -> str:
    """One sentence, which claims no more than the tests do."""
    if found["problems"]:
        return "No parity: " + "; ".join(found["problems"])
    return "Parity: no more texts change with MTP than without it, as far as so many can show."


def title(found: dict[str, Any]) -> str:
    """Label, profile or model."""
    name = found["label"] or found["config"]["profile"] or found["servers"][1]["model"]
    return f"{name}: greedy parity with and without MTP"


def render(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    parts = [f"## {title(found)}", table(HEAD, rows(found)), table(TESTS_HEAD, tests(found))]
    parts += [f"**{verdict(found)}**", note(found)]
    parts += [provenance_line(found), f"`{found['provenance']['command']}`"]
    return "\n\n".join(parts) + "\n"


def page(found: dict[str, Any]) -> str:
    """The result as HTML, with where texts part and how clear the best token was."""
    parts = [f'<p class="warning">{escape(verdict(found))}</p>'] if found["problems"] else []
    parts += [html.table(HEAD, rows(found)), html.table(TESTS_HEAD, tests(found))]
    parts += [f"<p>{escape(text)}</p>" for text in (verdict(found), note(found))]
    series = [
        Series(
            name,
            [(p["position"], p["gap"]) for p in found[key]["partings"] if p["gap"] is not None],
            line=False,
        )
        for key, name in (("control", "control"), ("mtp", "MTP"))
    ]
    caption = "Where texts part: gap of the two tokens"
    if drawing := chart(caption, "token", "gap, nats", series):
        parts.append(f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>")
    parts.append(f"<p>{escape(provenance_line(found))}</p>")
    parts.append(f"<p><code>{escape(found['provenance']['command'])}</code></p>")
    return html.page(title(found), parts)


def _prompts(config: ParityConfig) -> list[Prompt]:
    if config.prompts is None:
        return parity.default_prompts(config.num_prompts)
    try:
        prompts = read_prompts(config.prompts)
    except OSError as error:
        raise LoadError(f"{config.prompts}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{config.prompts}: each line must be {{id, text}}: {error}") from error
    if len(prompts) < config.num_prompts:
        raise LoadError(
            f"{config.prompts}: {len(prompts)} prompts; {config.num_prompts} are asked for"
        )
    return prompts[: config.num_prompts]


def _serving(
    config: ParityConfig, name: str, url: str | None, tokens: int | None, output: Path,
    start: Launch,
) -> AbstractContextManager[str]:  # fmt: skip
    if url is not None:
        return nullcontext(url.rstrip("/"))
    assert config.profile is not None
    log = output.with_name(f"{output.stem}-{name}.log")
    arm = Arm(name, config.profile, config.checkpoint, tokens, free_port(), log,
              config.start_timeout_s)  # fmt: skip
    say(f"{name}: starting the server, its log is {log}")
    return _Started(arm, start)


class _Started(AbstractContextManager[str]):
    """A server that is started; gives its URL."""

    def __init__(self, arm: Arm, start: Launch) -> None:
        self._arm = arm
        self._running = start(arm)

    def __enter__(self) -> str:
        self._running.__enter__()
        return self._arm.url

    def __exit__(self, *failure: Any) -> bool | None:
        return self._running.__exit__(*failure)
