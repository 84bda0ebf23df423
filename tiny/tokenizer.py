"""Byte-level BPE with DeepSeek-V4's special tokens, and the chat form of a prompt.

The special tokens are those that vLLM's `deepseek_v4` tokenizer mode and its chat encoding use
(`tokenizers/deepseek_v4_encoding.py`); ids 0 and 1 are begin and end of sentence, as in the
original.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tiny.config import TinyConfig

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
DSML = "｜DSML｜"

# Tokens that a client must see in the text (vLLM's parsers look for them) are not "special".
VISIBLE_TOKENS = (THINK, END_THINK, DSML)
SPECIAL_TOKENS = (
    BOS,
    EOS,
    PAD,
    USER,
    ASSISTANT,
    THINK,
    END_THINK,
    DSML,
    "<｜latest_reminder｜>",
    "<｜deepseek_image｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜read_url｜>",
)
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def train(texts: Iterable[str], config: TinyConfig) -> Tokenizer:
    """Train a byte-level BPE of exactly config.vocab_size entries; deterministic.

    Encoding a text puts BOS in front, as the original tokenizer does; the chat encoding writes
    BOS itself and asks for no special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    hidden = [t for t in SPECIAL_TOKENS if t not in VISIBLE_TOKENS]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in hidden])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in VISIBLE_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, config.bos_token_id)]
    )
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise ValueError(
            f"tokenizer: {tokenizer.get_vocab_size()} entries were learned; vocab_size = "
            f"{config.vocab_size}: the text is too short"
        )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, config: TinyConfig) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
    }
    generation = {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    for name, content in (("tokenizer_config", settings), ("generation_config", generation)):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n")


def load(folder: Path) -> Tokenizer:
    """Read `tokenizer.json`.

    Raises:
        FileNotFoundError: no such file.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: {path} does not exist")
    return Tokenizer.from_file(str(path))


def chat_prompt(user: str) -> str:
    """One user turn in DeepSeek-V4's chat (non-thinking) form, up to the answer.

    Source: vLLM `tokenizers/deepseek_v4_encoding.py`, thinking_mode = "chat".
    """
    return f"{BOS}{USER}{user}{ASSISTANT}{END_THINK}"


def chat_exchange(user: str, answer: str) -> str:
    """A user turn with its answer and the end-of-sentence token."""
    return chat_prompt(user) + answer + EOS
