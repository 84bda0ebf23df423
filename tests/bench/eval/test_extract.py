"""Extraction on answer texts that were labelled by hand."""

import warnings
from pathlib import Path

import pytest

from bench.eval import extract, programs

HERE = Path(__file__).parent
PROMPT = '''from typing import List


def total(numbers: List[int]) -> int:
    """The sum of the numbers; 0 of none."""
'''


def texts(kind: str) -> list[tuple[str, str]]:
    """(label, text), in the order of the file."""
    _, *records = ("\n" + (HERE / f"answers_{kind}.txt").read_text()).split("\n=== ")
    return [(label, text) for label, _, text in (record.partition("\n") for record in records)]


def cases(kind: str) -> list:
    return [
        pytest.param(label, text, id=f"{kind}-{i}-{label}")
        for i, (label, text) in enumerate(texts(kind), 1)
    ]


def test_the_corpus_has_at_least_150_texts():
    assert sum(len(texts(kind)) for kind in ("number", "letter", "code")) >= 150


@pytest.mark.parametrize(("label", "text"), cases("number"))
def test_number(label, text):
    found = extract.number(text)
    if label in ("-", "refusal"):
        assert found.value is None or (label == "refusal" and found.how == "last number"), found
    else:
        assert extract.same_number(found.value, label), found
    assert (label == "refusal") <= extract.is_refusal(text)


@pytest.mark.parametrize(("label", "text"), cases("letter"))
def test_letter(label, text):
    found = extract.letter(text)
    assert found.value == (None if label in ("-", "refusal") else label), found
    assert extract.is_refusal(text) == (label == "refusal")


@pytest.mark.parametrize(("label", "text"), cases("code"))
def test_code(label, text):
    found = programs.program(text, PROMPT, "total")
    assert (found.source is None) == (label == "no_code"), found
    if found.source is None:
        return
    assert right(found.source) == (label == "runs"), found.source


def right(source: str) -> bool:
    """These programs are our own: they run here."""
    space: dict = {"__name__": "item"}
    try:
        exec(source, space)
        return space["total"]([1, 2, 3]) == 6 and space["total"]([]) == 0
    except (SyntaxError, NameError, ValueError):
        return False


@pytest.mark.parametrize(
    ("text", "value", "how"),
    [
        ("The code is 4719302.", "4719302", "only one"),
        ("I found 1234567, but the answer is 4719302.", "4719302", "the answer is"),
        ("\\boxed{4719302}", "4719302", "boxed"),
        ("1234567 and 4719302 are both there.", None, "several answers"),
        ("It is 12.", None, "no answer"),
        ("<think>4719302</think>", None, "no answer"),
    ],
)
def test_word(text, value, how):
    assert extract.word(text, r"\b\d{7}\b") == extract.Extraction(value, how)


def test_numbers_are_compared_exactly():
    assert extract.same_number("1/3", "1/3")
    assert not extract.same_number("3333/10000", "1/3")
    assert extract.same_number("18", "18.00")
    assert not extract.same_number(None, "0")


def test_imports_from_the_future_stand_before_the_prompts():
    """Behind what comes from the prompt they are a SyntaxError. A docstring may precede them."""
    answer = (
        '"""Sums."""\nfrom __future__ import annotations\n\n\ndef total(n):\n    return sum(n)\n'
    )
    for text in (f"```python\n{answer}```", answer):
        found = programs.program(text, PROMPT, "total")
        assert "List" in found.source
        assert programs.parses(found.source)
        assert right(found.source), found.source


@pytest.mark.parametrize(
    ("source", "can"),
    [
        ("x = 1\n", True),
        ("x = 1\nx is 1\n", True),  # with a warning, which is no error
        ("x =\n", False),
        ("x = 1\nfrom __future__ import annotations\n", False),
        ("return 1\n", False),
        (None, False),
    ],
)
def test_parses_is_whether_python_can_compile_it(source, can):
    with warnings.catch_warnings(action="error"):
        assert programs.parses(source) is can


def test_imports_and_helpers_of_the_prompt_are_kept():
    prompt = "import math\n\n\ndef helper(x):\n    return x\n\n\ndef main(x):\n    '''Doc.'''\n"
    found = programs.program(
        "```python\ndef main(x):\n    return helper(math.floor(x))\n```", prompt, "main"
    )
    space: dict = {}
    exec(found.source, space)
    assert space["main"](1.5) == 1
