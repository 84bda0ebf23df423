"""Training batches: windows of plain text and packed chat exchanges; held-out prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from tiny.corpus import Document, sentences
from tiny.tokenizer import chat_exchange

CHAT_ROW = 512
TRIES = 50  # draws for each held-out prompt
SHARED = 60  # characters that make a passage; held-out prompts are longer
OPENERS = (
    "Tell me a story.",
    "Hello.",
    "Quote me something.",
    "Say something about love.",
    "What happened next?",
    "Read to me.",
    "Please write a few lines.",
    "Who are you?",
)
FRAMES = (
    "{}",
    "{}",
    "Continue: {}",
    "Please continue this passage: {}",
    "What comes after this? {}",
)


@dataclass
class Data:
    """Tokens on the training device.

    plain: (N,) all training documents; heldout: (M,) the held-out ones; chat: (R, 512) packed
    exchanges, each beginning with the begin-of-sentence token.
    """

    plain: torch.Tensor
    heldout: torch.Tensor
    chat: torch.Tensor
    bos: int

    def windows(self, source: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
        """(len(starts), length) rows: begin-of-sentence, then length - 1 tokens from each start."""
        index = starts[:, None] + torch.arange(length - 1)
        rows = source[index.to(source.device)].long()
        return torch.cat((torch.full_like(rows[:, :1], self.bos), rows), dim=1)

    def batch(self, seed: int, step: int, rows: int, length: int, chat_share: float):
        """The rows (rows, length) of one training step; a function of seed and step alone."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        num_chat = round(rows * chat_share) if length <= CHAT_ROW else 0
        starts = torch.randint(0, len(self.plain) - length, (rows - num_chat,), generator=generator)
        plain = self.windows(self.plain, starts, length)
        if num_chat == 0:
            return plain
        picked = torch.randint(0, len(self.chat), (num_chat,), generator=generator)
        return torch.cat((plain, self.chat[picked.to(self.chat.device), :length].long()))

    def heldout_batch(self, rows: int, length: int) -> torch.Tensor:
        """Evenly spaced held-out windows (rows, length)."""
        starts = torch.linspace(0, len(self.heldout) - length, rows).long()
        return self.windows(self.heldout, starts, length)


def build(documents: list[Document], tokenizer: Tokenizer, bos: int, device: str) -> Data:
    """Tokenize everything once."""

    def flat(held_out: bool) -> torch.Tensor:
        texts = [d.text for d in documents if d.held_out == held_out]
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        return torch.tensor([i for e in encoded for i in e.ids], dtype=torch.int16, device=device)

    exchanges = chat_exchanges([d for d in documents if not d.held_out])
    encoded = tokenizer.encode_batch(exchanges, add_special_tokens=False)
    rows: list[list[int]] = [[]]
    for e in encoded:
        if len(rows[-1]) >= CHAT_ROW:
            rows.append([])
        rows[-1] += e.ids
    full = [row[:CHAT_ROW] for row in rows if len(row) >= CHAT_ROW]
    chat = torch.tensor(full, dtype=torch.int16, device=device)
    return Data(flat(False), flat(True), chat, bos)


def chat_exchanges(documents: list[Document], seed: int = 0) -> list[str]:
    """Chat exchanges made of the text: an excerpt as the question, what follows as the answer.

    An answer has one to three sentences and stops at the end of its paragraph; some questions
    are short openers that any passage answers. Shuffled, deterministic.
    """
    rng = random.Random(seed)
    exchanges = []
    for document in documents:
        for paragraph in document.text.split("\n\n"):
            parts = sentences(paragraph)
            at = 0
            while at + 1 < len(parts):
                asked, answered = rng.randint(1, 3), rng.randint(1, 3)
                question = " ".join(parts[at : at + asked])
                answer = " ".join(parts[at + asked : at + asked + answered])
                at += asked
                if not answer or len(question) > 600 or len(answer) > 320:
                    continue
                user = rng.choice(FRAMES).format(question)
                if rng.random() < 0.15:
                    user = rng.choice(OPENERS)
                exchanges.append(chat_exchange(user, answer))
    rng.shuffle(exchanges)
    return exchanges


def draw_prompts(
    documents: list[Document],
    tokenizer: Tokenizer,
    count: int,
    seed: int,
    others: Sequence[str] = (),
) -> list[str]:
    """Held-out prompts of 40 to 200 tokens that share no passage with each other or `others`.

    Three quarters come from the held-out novel, the rest from the held-out books of the Bible;
    each starts at a sentence and ends wherever its length falls.

    Raises:
        ValueError: the held-out text has no room for that many.
    """
    rng = random.Random(seed)
    held = [d for d in documents if d.held_out]
    novels = [s for p in held[0].text.split("\n\n") for s in sentences(p)]
    books = [s for d in held[1:] for p in d.text.split("\n\n") for s in sentences(p)]
    taken = [" ".join(text.split()) for text in others]
    drawn: list[str] = []
    for _ in range(TRIES * count):
        pool = novels if len(drawn) % 4 else books
        start = rng.randrange(len(pool) - 60)
        encoded = tokenizer.encode(" ".join(pool[start : start + 60]), add_special_tokens=False)
        text = tokenizer.decode(encoded.ids[: rng.randint(40, 200)]).rstrip()
        flat = " ".join(text.split())
        if others and any(_overlap(flat, other) for other in taken):
            continue
        taken.append(flat)
        drawn.append(text)
        if len(drawn) == count:
            return drawn
    raise ValueError(f"prompts: {len(drawn)} of {count} found in {TRIES * count} tries")


def _overlap(a: str, b: str) -> bool:
    """Whether both have a passage of SHARED characters: one's start or end is in the other."""
    short = min(len(a), len(b), SHARED)
    return any(x[:short] in y or x[-short:] in y for x, y in ((a, b), (b, a)))


def write_heldout(documents: list[Document], tokenizer: Tokenizer, folder: Path) -> None:
    """Write `heldout.jsonl` (64 prompts) and `heldout.txt` (about 60 KB)."""
    write_prompts(draw_prompts(documents, tokenizer, 64, 0), folder / "heldout.jsonl", "heldout")
    text = next(d for d in documents if d.held_out).text
    start = text.index("\n\n", 60_000) + 2
    (folder / "heldout.txt").write_text(text[start : text.index("\n\n", start + 60_000)] + "\n")


def write_prompts(texts: Sequence[str], path: Path, name: str) -> None:
    """One JSON object with `id` (NAME-00, ...) and `text` a line."""
    lines = [{"id": f"{name}-{i:02d}", "text": text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_prompts(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids (begin-of-sentence first) of the prompts in a `heldout.jsonl`."""
    if not path.is_file():
        raise FileNotFoundError(f"prompts: {path} does not exist")
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [tokenizer.encode(line["text"]).ids for line in lines]
