"""What a model's text gives as its answer: a number, a letter, or a given kind of code word.

The rules, in the order they are tried: an explicit mark (`\\boxed{}`, `####`, "the answer is"), the
last one that carries an answer; then bold; then what the kind of answer allows as a last resort.
Where the part that a rule looks at hedges ("12 or 14"), marked or not, there is no answer. `how`
says which rule found it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

# Reasoning that a server without a reasoning parser leaves in the text.
THINKING = (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"),
)  # fmt: skip
_REFUSAL = re.compile(
    r"\b(?:i\s*(?:'m|am)\s+(?:very\s+|really\s+)?sorry|i\s+apologi[sz]e|sorry),?\s+(?:but\s+)?"
    r"(?:i|we)\s*(?:can(?:no|')t|can not|am\s+(?:un|not\s+)able|'m\s+(?:un|not\s+)able|won't)"
    r"|\bi\s+(?:can(?:no|')t|can not|won't|must decline to)\s+"
    r"(?:help|assist|provide|answer|comply|fulfil|do that|solve|complete|discuss)"
    r"|\bi\s*(?:'m|am)\s+(?:unable|not able)\s+to\s+(?:help|assist|provide|answer|comply|solve)"
    r"|\bas an ai(?: language)? model, i (?:can|do|am)\w*(?:no|n')?t\b"
    r"|\bi must decline\b",
    re.I,
)


@dataclass(frozen=True)
class Extraction:
    """The answer as text, None where there is none, and the rule that decided."""

    value: str | None
    how: str


NOTHING = Extraction(None, "no answer")


def final_text(text: str) -> str:
    """What follows the reasoning; empty where the reasoning never ends."""
    for opening, closing in THINKING:
        if closing in text:
            text = text.rpartition(closing)[2]
        elif opening in text:
            text = text.partition(opening)[0]
    return text.strip()


def is_refusal(text: str) -> bool:
    """Whether the text declines to answer."""
    return bool(_REFUSAL.search(final_text(text).replace("’", "'")))


def number(text: str) -> Extraction:
    """The number that a text ends on, exactly: "18", "-5/2", "1000"."""
    return _extract(text, _number_in, _last_resort_number)


def letter(text: str, letters: str = "ABCD") -> Extraction:
    """The letter of the option that a text chooses."""
    rules = _Letters(letters)
    return _extract(text, rules.marked, rules.last_resort)


def word(text: str, pattern: str) -> Extraction:
    """The one string of a form that a text gives, where wrong ones can be told from right ones.

    Args:
        pattern: regular expression of the form, without groups. Two different ones in the part
            that holds the answer are a hedge.
    """
    form = re.compile(pattern)

    def inside(clause: str) -> str | None:
        found = list(dict.fromkeys(form.findall(clause)))
        if len(found) > 1:
            raise _HedgeError
        return found[0] if found else None

    return _extract(text, inside, lambda t: Extraction(inside(t), "only one"))


def same_number(left: str | None, right: str) -> bool:
    """Whether two numbers as `number` gives them are equal."""
    return left is not None and Fraction(left) == Fraction(right)


class _HedgeError(Exception):
    """Several answers where one is asked."""


def _extract(
    text: str, inside: Callable[[str], str | None], last: Callable[[str], Extraction]
) -> Extraction:
    kept = _plain(final_text(text))
    if not kept:
        return NOTHING
    try:
        for how, clause in _marked(kept):
            found = inside(clause)
            if found is not None:
                return Extraction(found, how)
        for bold in reversed(re.findall(r"\*\*(.+?)\*\*", kept, re.S)):
            found = inside(bold)
            if found is not None:
                return Extraction(found, "bold")
        found = last(kept.replace("*", ""))
        return found if found.value is not None else NOTHING
    except _HedgeError:
        return Extraction(None, "several answers")


# ---- text without what only typesets it ----

_MACRO = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox|operatorname|rm)\s*\{([^{}]*)\}"
)
# A sign apart from its number, or in words. Elsewhere it is a subtraction, a bullet or a dash.
_APART = re.compile(
    r"((?:[=≈:({]|####|\\approx\b|\b(?:is|be|equals)\b)[ \t*]*)"
    r"(?:-|\b(?:minus|negative)\b)[ \t]+(?=[\d.])",
    re.I,
)
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")


def _plain(text: str) -> str:
    text = re.sub(r"<<[^<>]*>>", "", text)  # GSM8K's calculator notes
    text = text.replace("−", "-").replace("–", "-").replace("’", "'").replace("{,}", ",")
    text = re.sub(r"(?<=\d)(?:\\[,;:! ]|[\u00a0\u2009\u202f'_])+(?=\d{3})", "", text)
    text = re.sub(
        r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d.,]*\d)", lambda m: m[0].replace(" ", ""), text
    )
    text = re.sub(r"(?<!\w)_([^_\n]+)_(?!\w)", r"\1", text.replace("__", "**"))
    for _ in range(3):  # nested at most so deep
        text = _FRACTION.sub(
            lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", _MACRO.sub(r" \1 ", text)
        )
    text = re.sub(r"\\(?:left|right|displaystyle|quad|qquad|[,;:! ()\[\]])", " ", text)
    text = re.sub(r"\\(?=[$%#&_])", "", text)
    # A sign of currency and the mark of inline mathematics are the same character.
    text = re.sub(r"[$€£¥`]", "", text)
    return _APART.sub(r"\1-", text).strip()


# ---- explicit marks, the last one first ----

_ANSWER = re.compile(
    r"\b(?:answer|choice|option)\b(?:[^.\n:=]|\.(?=\d)){0,60}?"
    r"(?:\b(?:is|would be|should be)\b|[:=])[\s*:]*"
    r"|(?:^|\n)[#*\s]*(?:final\s+)?answer[*\s]*\n+[\s*]*"
    r"|(?:^|\n)\s*####\s*|<answer>\s*",
    re.I,
)
_CLAUSE_END = re.compile(r"[.!?;](?=[\s*]|$)|\n")


def _marked(text: str) -> Iterator[tuple[str, str]]:
    """(rule, what follows the mark up to the end of its clause), from the last to the first."""
    found = [(m.start(), _rule(m[0]), _clause(text[m.end() :])) for m in _ANSWER.finditer(text)]
    for start in (m.end() for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)):
        found.append((start, "boxed", _braced(text[start:])))
    for _, rule, clause in sorted(found, reverse=True):
        if not re.match(r"(?:\s*definitely)?\s*not\b", clause, re.I):
            yield rule, clause


def _rule(mark: str) -> str:
    return "####" if "####" in mark and "answer" not in mark.lower() else "the answer is"


def _clause(rest: str) -> str:
    end = _CLAUSE_END.search(rest)
    clause = rest[: end.start()] if end else rest
    if "\\boxed" in clause:
        start = clause.index("{", clause.index("\\boxed")) + 1
        return _braced(clause[start:])
    return clause


def _braced(rest: str) -> str:
    depth = 1
    for i, char in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return rest[:i]
    return ""  # never closed: cut off


# ---- numbers ----

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?<![\w.,])(?P<sign>(?<![\d)])-)?(?P<whole>{_DIGITS})"
    r"(?:(?P<mixed>\s\d+)?\s*/\s*(?P<under>\d+)(?![\d/]))?"
    r"(?:\s*(?:\\times|×|x)\s*10\s*\^\s*\{?(?P<power>-?\d+)\}?)?"
    r"(?:\s*(?P<scale>hundred|thousand|million|billion|trillion)\b)?(?![\d:]*\d)",
    re.I,
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
           "trillion": 10**12}  # fmt: skip
_REASON = re.compile(r"\b(?:because|since)\b", re.I)
_RESULT = re.compile(r"=|≈|\\approx|\bwhich is\b|\bequals\b|\bi\.e\.")


def _value(found: re.Match[str]) -> str:
    value = Fraction(found["whole"].replace(",", ""))
    if found["under"]:
        if int(found["under"]) == 0:
            raise _HedgeError
        if found["mixed"]:
            value += Fraction(int(found["mixed"]), int(found["under"]))
        else:
            value /= int(found["under"])
    if found["power"]:
        value *= Fraction(10) ** max(-30, min(30, int(found["power"])))
    if found["scale"]:
        value *= _SCALES[found["scale"].lower()]
    return str(-value if found["sign"] else value)


def _number_in(clause: str) -> str | None:
    """The first number after the last sign of a result, else the first at all.

    Where one number stands before the reason for it, it is that.
    """
    said = _REASON.split(clause)[0]
    if len(_NUMBER.findall(said)) == 1:
        clause = said
    pieces = [p for p in _RESULT.split(clause) if _NUMBER.search(p)]
    if not pieces:
        return None
    found = list(_NUMBER.finditer(pieces[-1]))
    for one, next_one in zip(found, found[1:], strict=False):
        _refuse_hedge(pieces[-1], one, next_one)
    return _value(found[0])


def _refuse_hedge(text: str, one: re.Match[str], next_one: re.Match[str]) -> None:
    between = text[one.end() : next_one.start()]
    if re.search(r"\bor\b", between) and _value(one) != _value(next_one):
        raise _HedgeError


def _last_resort_number(text: str) -> Extraction:
    """The last number, unless its clause offers it beside another."""
    found = list(_NUMBER.finditer(text))
    if not found:
        return NOTHING
    if len(found) > 1 and not _CLAUSE_END.search(text[found[-2].end() : found[-1].start()]):
        _refuse_hedge(text, found[-2], found[-1])
    return Extraction(_value(found[-1]), "last number")


# ---- letters ----


_JOINED = re.compile(r"[\s,]*(?:or|and|/|,|&)[\s,]*(?:(?:also|even|maybe|option|choice)\s)*[\s(]*")


class _Letters:
    """Rules for options named by capital letters."""

    def __init__(self, letters: str) -> None:
        # The article "A" is no option: what follows an option is a mark or one of a few words.
        article = r"(?<=\bA)\s+(?!(?:or|and|because|since|as|not|is)\b)[a-z]"
        one = rf"(?<![\w'])\(?(?P<letter>[{letters}])(?![\w'+#])(?!{article})\)?"
        named = rf"(?:option|choice|answer)\s*\(?(?P<named>[{letters}])(?![\w'])"
        self._one = re.compile(rf"{named}|{one}")
        self._line = re.compile(rf"^\s*\(?([{letters}])(?:[).:](?:\s|$)|\s*$)", re.M)
        self._named = re.compile(rf"\b(?:[Oo]ption|[Cc]hoice)\s*\(?([{letters}])\b")
        self._bracketed = re.compile(rf"(?<!\w)\(([{letters}])\)")
        either = rf"[{letters.upper()}{letters.lower()}]"
        self._bracket = re.compile(rf"\b({either})\)")
        self._begins = re.compile(
            rf"\W*({either})\)(?!\s*(?:or|and|is|isn't|was|are|can|cannot|can't|does|has)\b)"
        )
        self._alone = re.compile(rf"\W*([{letters.upper()}{letters.lower()}])\W*")

    def marked(self, clause: str) -> str | None:
        """The letter that a clause chooses."""
        if alone := self._alone.fullmatch(clause) or self._begun(clause):
            return alone[1].upper()
        found = list(self._one.finditer(clause))
        if not found:
            return None
        chosen = [m["letter"] or m["named"] for m in found]
        for i in range(1, len(found)):
            between = clause[found[i - 1].end() : found[i].start()]
            if not _JOINED.fullmatch(between):
                break
            if chosen[i] != chosen[0]:
                raise _HedgeError
        return chosen[0]

    def _begun(self, text: str) -> re.Match[str] | None:
        """A beginning as "b) ocean", where no other letter has a bracket."""
        return self._begins.match(text) if len(self._bracket.findall(text)) == 1 else None

    def last_resort(self, text: str) -> Extraction:
        """A text that is a letter, a last line that begins with one, a last "option B"."""
        if alone := self._alone.fullmatch(text):
            return Extraction(alone[1].upper(), "only a letter")
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) == 1 and (begun := self._begun(text)):
            return Extraction(begun[1].upper(), "line")
        starts = [m[1] for line in lines if (m := self._line.match(line))]
        # Lines that begin with several letters repeat the options.
        if lines and starts and len(set(starts)) == 1:
            return Extraction(starts[-1], "line")
        named = self._named.findall(text)
        if named and len(set(named[-2:])) == 1:
            return Extraction(named[-1], "option")
        if lines and len(bracketed := self._bracketed.findall(lines[-1])) == 1:
            return Extraction(bracketed[0], "brackets")
        if lines and (m := self._line.match(lines[-1])) and len(lines) > 1:
            before = self._line.match(lines[-2])
            return NOTHING if before else Extraction(m[1], "last line")
        return NOTHING
