"""Token counts as people write them: 2048, 128k, 524k, 1M."""

from __future__ import annotations

import re

# As vLLM reads --max-model-len: small letters are powers of 1000, capital ones of 1024.
_FACTORS = {"": 1, "k": 1000, "m": 1000**2, "K": 1024, "M": 1024**2}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmM]?)")


def parse_size(text: str) -> int:
    """Tokens.

    Raises:
        ValueError: not a number with one of k, m, K, M behind it, or not a whole positive count.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"size {text!r}; must be a number, with k, m, K or M behind it")
    value = float(found[1]) * _FACTORS[found[2]]
    if value != int(value) or value < 1:
        raise ValueError(f"size {text!r} is {value:g} tokens; must be a whole positive number")
    return int(value)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Token counts separated by commas; none of an empty text."""
    return tuple(parse_size(part) for part in text.split(",")) if text.strip() else ()


def format_size(tokens: int) -> str:
    """Short text with no digit lost: 524000 is 524k, 4096 stays 4096."""
    for letter in ("M", "m", "k"):
        if tokens % _FACTORS[letter] == 0:
            return f"{tokens // _FACTORS[letter]}{letter}"
    return str(tokens)
