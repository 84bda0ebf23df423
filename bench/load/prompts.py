"""Prompts of known length that share no prefix.

The text of a prompt depends on the seed and on what it is for, so two runs ask the same; the nonce
in its first block is new each time, so neither finds the other's blocks in the prefix cache.
"""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from bench.load.config import Text
from bench.load.errors import LoadError

NONCE_TOKENS = 16
NONCE_WORDS = 8  # of four hexadecimal digits, for prompts that are text
FIT_ROUNDS = 16
FIT_SLACK = 8  # tokens that a chat may be short


@dataclass(frozen=True)
class TokenPrompts:
    """Makes token-id prompts.

    corpus: token ids, shape (tokens,). special: ids every prompt starts with (BOS).
    """

    corpus: np.ndarray
    special: tuple[int, ...]
    text: Text
    seed: int

    @property
    def least(self) -> int:
        """Tokens of the shortest prompt: the special ones, the nonce and one more."""
        return len(self.special) + NONCE_TOKENS + 1

    def make(self, depth: int, purpose: str) -> list[int]:
        """Exactly `depth` token ids.

        Raises:
            LoadError: `depth` has no room for the nonce.
        """
        if depth < self.least:
            raise LoadError(f"depth {depth}: must be at least {self.least}, for the nonce")
        fresh = np.random.default_rng(secrets.randbits(64))
        nonce = self.corpus[fresh.integers(len(self.corpus), size=NONCE_TOKENS)]
        body = self._body(depth - len(self.special) - NONCE_TOKENS, purpose)
        return [*self.special, *nonce.tolist(), *body.tolist()]

    def _body(self, size: int, purpose: str) -> np.ndarray:
        rng = np.random.default_rng([self.seed, zlib.crc32(purpose.encode())])
        if self.text is Text.RANDOM:
            return np.unique(self.corpus)[rng.integers(len(np.unique(self.corpus)), size=size)]
        # Text shorter than the prompt starts over.
        start = int(rng.integers(max(1, len(self.corpus) - size)))
        return np.take(self.corpus, range(start, start + size), mode="wrap")


@dataclass(frozen=True)
class ChatPrompts:
    """Makes chats of one message, fitted by counting with the server's tokenizer and template."""

    corpus: str
    seed: int
    count: Callable[[str], Awaitable[int]]

    async def make(self, depth: int, purpose: str) -> str:
        """A message whose chat is `depth` tokens long, or up to FIT_SLACK shorter.

        Raises:
            LoadError: no length of text comes so close.
        """
        rng = np.random.default_rng([self.seed, zlib.crc32(purpose.encode())])
        words = [secrets.token_hex(2) for _ in range(NONCE_WORDS)]
        prefix = " ".join(words) + "\n"
        empty = await self.count(prefix)
        if empty > depth:
            raise LoadError(f"depth {depth}: an empty chat with its nonce has {empty} tokens")
        size = max(1, (depth - empty) * 4)
        start = int(rng.integers(max(1, len(self.corpus) - 2 * size)))
        low, high = 0, None  # characters that are short of depth, and over it
        best: tuple[int, str] | None = None
        for _ in range(FIT_ROUNDS):
            text = prefix + self._slice(start, size)
            counted = await self.count(text)
            if counted <= depth and (best is None or counted > best[0]):
                best = (counted, text)
            if counted == depth:
                break
            if counted < depth:
                low = size
            else:
                high = size
            guess = round(size * (depth - empty) / max(1, counted - empty))
            inside = guess > low and (high is None or guess < high)
            size = guess if inside else (low + (high or 2 * size + 8)) // 2
            if size == low:
                break
        if best is None or depth - best[0] > FIT_SLACK:
            raise LoadError(f"depth {depth}: the closest chat has {best and best[0]} tokens")
        return best[1]

    def _slice(self, start: int, size: int) -> str:
        repeats = -(-(start + size) // len(self.corpus))
        return (self.corpus * repeats)[start : start + size]
