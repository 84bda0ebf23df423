"""The bundled text and its tokens.

`novels.txt.xz` holds the six novels of Jane Austen (public domain), paragraphs on one line each,
novels separated by a form feed. The first, Northanger Abbey, was held out when the tiny model was
trained: prompts that fit into it are new to that model.
"""

from __future__ import annotations

import lzma
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np

NOVELS = Path(__file__).with_name("novels.txt.xz")
PIECE_CHARS = 200_000  # tokenized at a time
# A prompt starts anywhere in text that is at least so many times its length, where there is so
# much: two prompts then share little, and short ones stay in the first novel.
ROOM = 2

Tokenize = Callable[[str], Awaitable[list[int]]]


def novels() -> list[str]:
    """The texts, in order."""
    return lzma.decompress(NOVELS.read_bytes()).decode().split("\f")


async def tokens_for(depth: int, tokenize: Tokenize) -> np.ndarray:
    """Tokens of so many whole novels that a prompt of `depth` has room, or of all.

    Returns:
        int64, shape (tokens,).
    """
    parts: list[list[int]] = []
    for novel in novels():
        for start in range(0, len(novel), PIECE_CHARS):
            parts.append(await tokenize(novel[start : start + PIECE_CHARS]))
        if sum(map(len, parts)) >= ROOM * depth:
            break
    return np.concatenate([np.array(part, dtype=np.int64) for part in parts])


def text_for(num_chars: int) -> str:
    """Text with room for a prompt of so many characters, or all there is."""
    text = ""
    for novel in novels():
        text += novel
        if len(text) >= ROOM * num_chars:
            break
    return text
