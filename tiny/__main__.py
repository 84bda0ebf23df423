"""`python -m tiny corpus | tokenizer | prompts | train | export | eval | info`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m tiny", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("corpus", help="fetch the training text")

    words = commands.add_parser("tokenizer", help="train the tokenizer, write held-out prompts")
    words.add_argument("--out", type=Path, default=CHECKPOINT)
    words.add_argument("--heldout", type=Path, default=HERE)

    prompts = commands.add_parser("prompts", help="draw more held-out prompts, apart from those")
    prompts.add_argument("--out", type=Path, required=True)
    prompts.add_argument("--count", type=int, default=192)
    prompts.add_argument("--seed", type=int, default=1)

    train = commands.add_parser("train", help="train, export and evaluate")
    _add_train_options(train)

    export = commands.add_parser("export", help="rewrite a checkpoint, in either layout")
    export.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    export.add_argument("--out", type=Path, required=True)
    export.add_argument("--experts", choices=["fp4", "w4a16"], default="fp4")
    export.add_argument("--shuffle-mtp-experts", action="store_true", help="negative control")
    export.add_argument("--seed", type=int, default=0)
    export.add_argument("--repeat-index-heads", type=int, metavar="N", help="wider, the same model")

    evaluate = commands.add_parser("eval", help="acceptance of the MTP head on held-out prompts")
    evaluate.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    evaluate.add_argument("--prompts", type=Path, default=HERE / "heldout.jsonl")
    evaluate.add_argument("--num-prompts", type=int, default=64)
    evaluate.add_argument("--num-speculative-tokens", type=int, default=1)
    evaluate.add_argument("--max-tokens", type=int, default=64)
    evaluate.add_argument("--device", default="cpu")

    info = commands.add_parser("info", help="size and digest of a checkpoint")
    info.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    return top


def _add_train_options(train: argparse.ArgumentParser) -> None:
    from tiny.train import TrainConfig

    date = datetime.now(UTC).strftime("%Y-%m-%d")
    defaults = {"out": CHECKPOINT, "results": Path(f"results/tiny-train-{date}.json")}
    for field in fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        default = defaults[field.name] if field.default is MISSING else field.default
        if isinstance(default, bool):
            train.add_argument(flag, action="store_true", default=default)
        else:
            train.add_argument(flag, type=type(default), default=default, metavar=str(default))


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a refusal is one line on standard error and exit status 1."""
    options = parser().parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run_corpus(options: argparse.Namespace) -> int:
    from tiny import corpus

    corpus.fetch()
    documents = corpus.load()
    for document in documents:
        mark = "held out" if document.held_out else ""
        print(f"{len(document.text):>9,} {document.title:<24} {mark}")
    print(f"{sum(len(d.text) for d in documents):>9,} characters in {len(documents)} documents")
    return 0


def run_tokenizer(options: argparse.Namespace) -> int:
    from tiny import corpus, data, tokenizer
    from tiny.config import TinyConfig

    documents, config = corpus.load(), TinyConfig()
    words = tokenizer.train((d.text for d in documents if not d.held_out), config)
    tokenizer.save(words, options.out, config)
    data.write_heldout(documents, words, options.heldout)
    print(f"{words.get_vocab_size()} entries in {options.out}; prompts in {options.heldout}")
    return 0


def run_prompts(options: argparse.Namespace) -> int:
    from tiny import corpus, data, tokenizer

    lines = (HERE / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    known = [json.loads(line)["text"] for line in lines]
    words = tokenizer.load(CHECKPOINT)
    drawn = data.draw_prompts(corpus.load(), words, options.count, options.seed, known)
    data.write_prompts(drawn, options.out, options.out.stem)
    print(f"{len(drawn)} prompts in {options.out}")
    return 0


def run_train(options: argparse.Namespace) -> int:
    from tiny.train import TrainConfig, run

    values = {f.name: getattr(options, f.name) for f in fields(TrainConfig)}
    config = TrainConfig(**values)
    print(config, file=sys.stderr)
    record = run(config)
    print(json.dumps(record["figures"], indent=1, ensure_ascii=False))
    return 0


def run_export(options: argparse.Namespace) -> int:
    from tiny import export, load

    if options.shuffle_mtp_experts:
        export.shuffle_mtp_experts(options.checkpoint, options.out, options.seed)
    elif options.repeat_index_heads:
        export.repeat_index_heads(options.checkpoint, options.out, options.repeat_index_heads)
    else:
        layout = export.Layout.W4A16 if options.experts == "w4a16" else export.Layout.ORIGINAL
        model = load.load(options.checkpoint)
        export.export(model, options.out, layout, tokenizer=options.checkpoint)
    print(json.dumps(export.describe(options.out), indent=1))
    return 0


def run_eval(options: argparse.Namespace) -> int:
    from tiny import data, generate, load, tokenizer

    model = load.load(options.checkpoint, options.device)
    words = tokenizer.load(options.checkpoint)
    prompts = data.read_prompts(options.prompts, words)[: options.num_prompts]
    figures = generate.acceptance(
        model, prompts, options.num_speculative_tokens, options.max_tokens
    )
    print(json.dumps(figures.to_dict(), indent=1))
    return 0


def run_info(options: argparse.Namespace) -> int:
    from tiny import export

    print(json.dumps(export.describe(options.checkpoint), indent=1))
    return 0


COMMANDS = {
    "corpus": run_corpus,
    "tokenizer": run_tokenizer,
    "prompts": run_prompts,
    "train": run_train,
    "export": run_export,
    "eval": run_eval,
    "info": run_info,
}

if __name__ == "__main__":
    sys.exit(main())
