"""The program in a model's answer to a HumanEval item, completed so that it runs."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from dataclasses import dataclass

from bench.eval.extract import final_text

_FENCE = re.compile(
    r"^[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.M | re.S
)
_PYTHON = {"", "python", "python3", "py"}
_STARTS = re.compile(
    r"^(?:def |async def |class |import |from \S+ import |@|[A-Za-z_]\w*\s*(?::[^=\n]+)?= )"
)


@dataclass(frozen=True)
class Program:
    """Source that defines the function asked for, and the rule that found it."""

    source: str | None
    how: str


def program(text: str, prompt: str, entry_point: str) -> Program:
    """The program that the text gives for a prompt which ends in the head of `entry_point`.

    The last code block that defines the function, behind the blocks before it that hold nothing
    but imports and definitions; else a block or text that is the function's body, behind the
    prompt; else the lines of a text without fences. What the prompt has before the function's head
    is put in front, so that its imports and helpers are there.
    """
    kept = final_text(text) if _has_marks(text) else text
    blocks = [m[3] for m in _FENCE.finditer(kept) if m[2].lower() in _PYTHON]
    for number, block in reversed([*enumerate(map(textwrap.dedent, blocks))]):
        if _defines(block, entry_point):
            before = [b for b in map(textwrap.dedent, blocks[:number]) if _only_defines(b)]
            whole = "\n".join([*before, block])
            source = whole if parses(whole) else block
            return Program(_behind_head(source, prompt, entry_point), "block")
    for block in reversed(blocks):
        if (source := _as_body(block, prompt, entry_point)) is not None:
            return Program(source, "body in a block")
    if blocks:
        return Program(None, "no block defines the function")
    if re.search(rf"^[ \t]*(?:async )?def {re.escape(entry_point)}\b", kept, re.M):
        source = _without_prose(kept, entry_point)
        if source is not None:
            return Program(_behind_head(source, prompt, entry_point), "bare program")
    if (source := _as_body(kept, prompt, entry_point)) is not None:
        return Program(source, "bare body")
    return Program(None, "no program")


def parses(source: str | None) -> bool:
    """Whether Python can compile it; this says little about whether it is right."""
    if source is None:
        return False
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(source, "answer.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _has_marks(text: str) -> bool:
    # Stripping would take the indent of a bare body.
    return final_text(text) != text.strip()


def _defines(source: str, entry_point: str) -> bool:
    return bool(
        re.search(
            rf"^(?:async )?def {re.escape(entry_point)}\b|^{re.escape(entry_point)}\s*=",
            source,
            re.M,
        )
    )


def _only_defines(source: str) -> bool:
    """Whether it imports and defines, and runs nothing."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return parses(source) and all(isinstance(node, kinds) for node in ast.parse(source).body)


def _head(prompt: str, entry_point: str) -> str:
    """The prompt up to the function's head: imports and helpers."""
    found = list(re.finditer(rf"^def {re.escape(entry_point)}\b", prompt, re.M))
    return prompt[: found[-1].start()] if found else ""


def _behind_head(source: str, prompt: str, entry_point: str) -> str:
    """The head, then the program; Python wants imports from `__future__` before both."""
    head = _head(prompt, entry_point)
    if not head.strip() or not parses(source):
        return head + source
    future = [
        node.end_lineno or 0
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
    ]
    lines = source.split("\n")
    first, rest = lines[: max(future, default=0)], lines[max(future, default=0) :]
    return "\n".join([*first, head + "\n".join(rest)])


def _as_body(text: str, prompt: str, entry_point: str) -> str | None:
    """Prompt and body; a body without indent gets one. None where that does not compile."""
    if not text.strip() or _defines(text, entry_point):
        return None
    body = text.strip("\n")
    for candidate in (body, textwrap.indent(textwrap.dedent(body), "    ")):
        source = f"{prompt.rstrip()}\n{candidate}\n"
        if parses(source) and _does_something(source, entry_point):
            return source
    return None


def _does_something(source: str, entry_point: str) -> bool:
    """Whether the function has more than words and definitions: prose can parse too."""
    idle = (
        ast.Expr
        | ast.FunctionDef
        | ast.AsyncFunctionDef
        | ast.ClassDef
        | ast.Import
        | ast.ImportFrom
    )
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == entry_point:
            return any(not isinstance(part, idle) for part in node.body)
    return False


def _without_prose(text: str, entry_point: str) -> str | None:
    """The longest run of whole lines, from the first that begins a statement, that compiles."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if _STARTS.match(line)]
    for start in starts:
        for end in range(len(lines), start, -1):
            source = "\n".join(lines[start:end]) + "\n"
            if parses(source):
                if _defines(source, entry_point):
                    return source
                break
    return None
