"""`python -m tiny corpus | tokenizer | prompts | train | export | eval | info`.

Exit status: 0 done; 1 a refusal, of a checkpoint or a folder; 2 bad options, or the system refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"


REFUSED, SYSTEM_ERROR = 1, 2


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; must be a whole number of at least 1")
    return int(text)


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
    prompts.add_argument("--count", type=count, default=192)
    prompts.add_argument("--seed", type=int, default=1)

    train = commands.add_parser("train", help="train, export and evaluate")
    _add_train_options(train)

    export = commands.add_parser("export", help="rewrite a checkpoint, in either layout")
    export.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    export.add_argument("--out", type=Path, required=True)
    modes = export.add_mutually_exclusive_group()
    # No default: argparse would not see that it was given.
    modes.add_argument("--experts", choices=["fp4", "w4a16"], help="layout; fp4 by default")
    modes.add_argument("--shuffle-mtp-experts", action="store_true", help="negative control")
    modes.add_argument(
        "--repeat-index-heads", type=count, metavar="N", help="wider, the same model"
    )
    export.add_argument("--seed", type=int, help="of --shuffle-mtp-experts; 0 by default")

    evaluate = commands.add_parser("eval", help="acceptance of the MTP head on held-out prompts")
    evaluate.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    evaluate.add_argument("--prompts", type=Path, default=HERE / "heldout.jsonl")
    evaluate.add_argument("--num-prompts", type=count, default=64)
    evaluate.add_argument("--num-speculative-tokens", type=count, default=1)
    evaluate.add_argument("--max-tokens", type=count, default=64)
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


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line; bad options end with exit status 2."""
    top = parser()
    options = top.parse_args(arguments)
    if options.command == "export" and not options.shuffle_mtp_experts and options.seed is not None:
        top.error("export: --seed is for --shuffle-mtp-experts only")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run one command; an error is one line on standard error."""
    options = parse(arguments)
    try:
        return COMMANDS[options.command](options)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except OSError as error:
        if error.errno is None:  # raised by us or a library, with a message of its own
            print(f"error: {error}", file=sys.stderr)
            return REFUSED
        # Errors of writing do not say where.
        place = error.filename or getattr(options, "out", None) or options.command
        print(f"error: {place}: {error.strerror}", file=sys.stderr)
        return SYSTEM_ERROR


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
        export.shuffle_mtp_experts(options.checkpoint, options.out, options.seed or 0)
    elif options.repeat_index_heads is not None:
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
    if figures.num_drafts == 0:
        raise ValueError(
            f"eval: nothing was drafted for {len(prompts)} prompts of {options.prompts} with "
            f"max_tokens = {options.max_tokens}; at least 1 and 2 are needed"
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
