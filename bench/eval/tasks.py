"""The scored tasks: what is asked, and how an answer is judged."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.eval import extract, programs, sources
from bench.eval.config import DEFAULT_MMLU_ITEMS, EvalConfig, TaskName
from bench.eval.items import Item, Judged, Message, Scorer, Verdict, chosen, fingerprint
from bench.eval.sandbox import Outcome, Sandbox
from bench.eval.sources import Origin, Row
from bench.load.errors import LoadError

LETTERS = "ABCD"
MATH_END = "Think step by step, and end with a line of the form: The answer is N."
CHOICE_END = "Think it through, and end with a line of the form: The answer is (X)."
CODE_START = (
    "Complete this Python function. Give the whole function, with what it imports, in one "
    "```python block."
)
MMLU_LICENCE = "MIT, (c) Dan Hendrycks"
GSM8K_LICENCE = "MIT, (c) OpenAI"


@dataclass(frozen=True)
class Task:
    """Items in the order in which they are asked. num_available: before the limit."""

    name: TaskName
    items: tuple[Item, ...]
    num_available: int
    origin: Origin
    score: Scorer

    @property
    def fingerprint(self) -> str:
        """Two tasks with the same one ask the same."""
        return fingerprint(self.items)


def default_tasks(config: EvalConfig) -> tuple[tuple[TaskName, ...], list[str]]:
    """The tasks that can be run without more files, and why others are left out."""
    names = [TaskName.GSM8K, TaskName.GSM8K_8SHOT, TaskName.MMLU, TaskName.HUMANEVAL, TaskName.LONG]
    notes = []
    if config.mmlu is None:
        names.remove(TaskName.MMLU)
        notes.append("mmlu is left out: no package carries its items; give them with --mmlu")
    return tuple(names), notes


def needs_sandbox(names: Sequence[TaskName]) -> bool:
    """Whether programs will be run."""
    return bool({TaskName.HUMANEVAL, TaskName.MINI_CODE} & set(names))


def make(name: TaskName, config: EvalConfig, sandbox: Sandbox | None) -> Task:
    """A task from its data; `long` is made by `longcontext`.

    Raises:
        LoadError: no data, or data that are not of the documented form.
    """
    if name in (TaskName.GSM8K, TaskName.GSM8K_8SHOT, TaskName.MINI_MATH):
        rows, origin = _math_rows(name, config)
        shots = _shots() if name is TaskName.GSM8K_8SHOT else ()
        items = sources.checked(rows, origin.source, lambda row: math_item(row, shots))
        scorer: Scorer = score_number
    elif name in (TaskName.MMLU, TaskName.MINI_CHOICE):
        rows, origin = _choice_rows(name, config)
        items = sources.checked(rows, origin.source, choice_item)
        scorer = score_letter
    else:
        rows, origin = _code_rows(name, config)
        items = sources.checked(rows, origin.source, code_item)
        scorer = code_scorer(sandbox)
    items = _named_apart(items)
    limit = config.limit
    if limit is None and name is TaskName.MMLU:
        limit = DEFAULT_MMLU_ITEMS
    return Task(name, tuple(chosen(items, limit, config.seed)), len(items), origin, scorer)


# ---- items ----


def math_item(row: Row, shots: Sequence[Message] = ()) -> Item:
    """From {question, answer} with `#### N` at the answer's end, or {prompt, expected}."""
    question = row["question"] if "question" in row else row["prompt"]
    answer = str(row["expected"] if "expected" in row else row["answer"]).rpartition("####")[2]
    expected = extract.number(answer).value
    if expected is None:
        raise ValueError(f"answer {answer[:40]!r}; must be a number, or end in #### and a number")
    asked = {"role": "user", "content": f"{question.strip()}\n\n{MATH_END}"}
    return Item(str(row.get("id") or _name(question)), (*shots, asked), expected)


def choice_item(row: Row) -> Item:
    """From {question, choices: four texts, answer: letter or 0..3, subject}."""
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) != len(LETTERS):
        raise ValueError("choices must be a list of four texts")
    answer = row["answer"]
    letter = LETTERS[answer] if answer in range(len(LETTERS)) else str(answer).strip().upper()
    if letter not in LETTERS or len(letter) != 1:
        raise ValueError(f"answer {answer!r}; must be one of A, B, C, D or 0, 1, 2, 3")
    options = "\n".join(f"{a}. {text}" for a, text in zip(LETTERS, choices, strict=True))
    question = f"{str(row['question']).strip()}\n\n{options}\n\n{CHOICE_END}"
    subject = str(row["subject"]) if row.get("subject") else None
    name = str(row.get("id") or f"{subject}/{_name(question)}")
    return Item(name, ({"role": "user", "content": question},), letter, subject)


def code_item(row: Row) -> Item:
    """From HumanEval's {task_id, prompt, entry_point, test}."""
    extra = {key: str(row[key]) for key in ("prompt", "entry_point", "test")}
    asked = f"{CODE_START}\n\n```python\n{extra['prompt'].strip()}\n```"
    return Item(str(row["task_id"]), ({"role": "user", "content": asked},), "", None, extra)


# ---- scorers ----


async def score_number(item: Item, text: str) -> Judged:
    """Exact match of the number."""
    found = extract.number(text)
    return _judged(found, text, extract.same_number(found.value, item.expected))


async def score_letter(item: Item, text: str) -> Judged:
    """Exact match of the letter."""
    found = extract.letter(text, LETTERS)
    return _judged(found, text, found.value == item.expected)


def code_scorer(sandbox: Sandbox | None) -> Scorer:
    """Pass at one try: the program is run with the item's checks.

    Raises:
        LoadError: there is no sandbox.
    """
    if sandbox is None:
        raise LoadError("programs of a model are not run without a sandbox")

    async def score(item: Item, text: str) -> Judged:
        extra = item.extra
        found = programs.program(text, extra["prompt"], extra["entry_point"])
        if found.source is None:
            return _nothing(text, found.how)
        run = await asyncio.to_thread(
            sandbox.run, found.source, extra["test"], extra["entry_point"]
        )
        details: dict[str, Any] = run.to_json() | {"parses": programs.parses(found.source)}
        verdict = Verdict.CORRECT if run.outcome is Outcome.PASSED else Verdict.WRONG
        return Judged(verdict, found.source, found.how, details)

    return score


def _judged(found: extract.Extraction, text: str, right: bool) -> Judged:
    refused = extract.is_refusal(text) and found.how in ("last number", "no answer")
    if found.value is None or refused:
        return _nothing(text, found.how)
    return Judged(Verdict.CORRECT if right else Verdict.WRONG, found.value, found.how)


def _nothing(text: str, how: str) -> Judged:
    verdict = Verdict.REFUSED if extract.is_refusal(text) else Verdict.INVALID
    return Judged(verdict, None, how)


# ---- data ----


def _math_rows(name: TaskName, config: EvalConfig) -> tuple[list[Row], Origin]:
    if name is TaskName.MINI_MATH:
        return sources.own("mini_math")
    if config.gsm8k is not None:
        return sources.user_file(config.gsm8k, GSM8K_LICENCE, (".jsonl",))
    return sources.packaged(sources.GSM8K)


def _choice_rows(name: TaskName, config: EvalConfig) -> tuple[list[Row], Origin]:
    if name is TaskName.MINI_CHOICE:
        return sources.own("mini_choice")
    if config.mmlu is None:
        raise LoadError("mmlu: no package carries its items; give a file or folder with --mmlu")
    return sources.user_file(config.mmlu, MMLU_LICENCE, (".jsonl", ".csv"))


def _code_rows(name: TaskName, config: EvalConfig) -> tuple[list[Row], Origin]:
    if name is TaskName.MINI_CODE:
        return sources.own("mini_code")
    if config.humaneval is not None:
        return sources.user_file(config.humaneval, sources.HUMANEVAL.licence, (".jsonl",))
    return sources.packaged(sources.HUMANEVAL)


def _shots() -> tuple[Message, ...]:
    """Eight worked examples, as turns of the chat before the question."""
    rows, _ = sources.own("worked_examples")
    turns: list[Message] = []
    for row in rows:
        turns.append({"role": "user", "content": f"{row['question']}\n\n{MATH_END}"})
        turns.append({"role": "assistant", "content": row["answer"]})
    return tuple(turns)


def _name(question: str) -> str:
    return sources.short_hash(question)


def _named_apart(items: Sequence[Item]) -> list[Item]:
    """The same items; of those with one name (MMLU asks a few twice) the later get a number."""
    seen: Counter[str] = Counter()
    named = []
    for item in items:
        seen[item.id] += 1
        number = seen[item.id]
        named.append(item if number == 1 else replace(item, id=f"{item.id}#{number}"))
    return named
