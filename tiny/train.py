"""Train the model and its MTP head; write the checkpoint and a record of the run.

Three phases, one step counter:

1. pretrain: target and head together on text and chat, in bfloat16;
2. qat: the same with FP4/FP8 weights and FP8 caches simulated (straight-through), some
   sequences long enough (2560) that the indexer has to choose;
3. head: the target is frozen; the head alone learns to predict what the target will say, on
   corpus text and on the target's own greedy continuations, three draft steps deep.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F

import tiny.attention
import tiny.model
import tiny.moe
from tiny import corpus, data, export, load, tokenizer
from tiny.attention import AttentionTrace, DraftHistory
from tiny.config import TinyConfig
from tiny.folder import check_replaceable
from tiny.generate import acceptance, greedy
from tiny.model import DeepseekV4
from tiny.plot import loss_curve

DTYPE = torch.bfloat16
DRAFT_WEIGHTS = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class TrainConfig:
    """Options of `python -m tiny train`.

    The defaults take about four minutes on an H100. With `budget_s` above 0, no step starts
    after that many seconds; what has been learned by then is exported.
    """

    out: Path
    results: Path
    cache: Path = corpus.CACHE
    tokenizer: Path = Path("tiny/checkpoint")
    prompts: Path = Path("tiny/heldout.jsonl")
    device: str = "cpu"
    seed: int = 0
    pretrain_steps: int = 550
    qat_steps: int = 150
    head_steps: int = 120
    rows: int = 32
    length: int = 512
    long_rows: int = 6
    long_length: int = 2560
    long_every: int = 6
    chat_share: float = 0.3
    lr: float = 2e-3
    head_lr: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    mtp_weight: float = 0.3
    index_weight: float = 0.1
    shared_dropout: float = 0.5
    bias_rate: float = 1e-3
    generated_rows: int = 256
    generated_length: int = 256
    eval_tokens: int = 64
    save_every: int = 200
    budget_s: float = 0.0
    compile: bool = False
    commit: str = ""

    def __post_init__(self) -> None:
        for name in ("pretrain_steps", "qat_steps", "head_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"train: {name} = {getattr(self, name)}; it must not be negative")
        if self.budget_s < 0:
            raise ValueError(f"train: budget_s = {self.budget_s}; it must not be negative")
        if self.length < 16 or self.rows < 1:
            raise ValueError(
                f"train: rows = {self.rows}, length = {self.length}; at least 1 and 16 are needed"
            )
        if not 0 <= self.shared_dropout < 1:
            raise ValueError(f"train: shared_dropout = {self.shared_dropout}; 0 <= p < 1")

    @property
    def joint_steps(self) -> int:
        """Steps in which target and head train together."""
        return self.pretrain_steps + self.qat_steps

    @property
    def total_steps(self) -> int:
        """All steps."""
        return self.joint_steps + self.head_steps


def run(config: TrainConfig) -> dict[str, object]:
    """load -> train (three phases) -> export -> record -> evaluate -> record."""
    started = time.time()
    check_replaceable(config.out)  # not only after minutes of training
    shape = TinyConfig()
    words = tokenizer.load(config.tokenizer)
    texts = data.build(corpus.load(config.cache), words, shape.bos_token_id, config.device)
    torch.manual_seed(config.seed)
    model = DeepseekV4(shape).to(config.device)
    model.mtp[0].block.ffn.shared_dropout = config.shared_dropout
    if config.compile:
        compile_hot_functions()
    trainer = Trainer(config, model, texts, deadline=started + (config.budget_s or math.inf))
    trainer.run()
    export.export(model, config.out, tokenizer=config.tokenizer)
    record = {
        "schema_version": 1,
        "kind": "tiny-train",
        "provenance": provenance(config),
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "wall_s": round(time.time() - started, 1),
        "steps": trainer.step,
        "figures": {"heldout": trainer.heldout_loss()},
        "curve": trainer.curve,
        "load_share": expert_load(trainer),
    }
    write_record(record, config.results)  # an interrupted evaluation loses nothing else
    figures = evaluate(config.out, config.prompts, config.device, config.eval_tokens)
    record["figures"].update(figures)
    record["wall_s"] = round(time.time() - started, 1)
    write_record(record, config.results)
    return record


def write_record(record: dict[str, object], path: Path) -> None:
    """Write a results file; renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    temporary.rename(path)
    if record["curve"]:
        path.with_suffix(".svg").write_text(loss_curve(record["curve"]))


def compile_hot_functions() -> None:
    """Fuse the many small operations of mHC, softmax attention and SwiGLU (GPU only)."""
    tiny.model.hc_pre = torch.compile(tiny.model.hc_pre)
    tiny.model.hc_post = torch.compile(tiny.model.hc_post)
    tiny.attention.attend = torch.compile(tiny.attention.attend)
    tiny.moe.clamped_swiglu = torch.compile(tiny.moe.clamped_swiglu)


class Trainer:
    """State of a run: model, optimizers, step, curve."""

    def __init__(
        self,
        config: TrainConfig,
        model: DeepseekV4,
        texts: data.Data,
        deadline: float = math.inf,
    ) -> None:
        self.config, self.model, self.texts, self.deadline = config, model, texts, deadline
        self.step, self.curve, self.loads = 0, [], {}
        self.state_path = config.cache / f"train-state-{config.seed}.pt"
        self.optimizer = self._optimizer(model.named_parameters(), config.lr)
        self.head_optimizer = self._optimizer(model.mtp.named_parameters(), config.head_lr)
        self.generated: torch.Tensor | None = None

    def _optimizer(self, parameters, lr: float) -> torch.optim.Optimizer:
        named = [(n, p) for n, p in parameters if p.requires_grad]
        decayed = [p for n, p in named if p.dim() >= 2 and "hc_" not in n and "ape" not in n]
        kept = [p for n, p in named if not (p.dim() >= 2 and "hc_" not in n and "ape" not in n)]
        groups = [
            {"params": decayed, "weight_decay": self.config.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ]
        fused = self.config.device.startswith("cuda")
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)

    def run(self) -> None:
        """All remaining steps; continues from the state file of an interrupted run."""
        self.resume()
        config, model = self.config, self.model
        bar = Progress(config.total_steps, self.step)
        while self.step < config.total_steps and time.time() < self.deadline:
            model.train()
            model.set_quantization(*[self.step >= config.pretrain_steps] * 2)
            losses = self.head_step() if self.step >= config.joint_steps else self.joint_step()
            self.step += 1
            if self.step % 25 == 0 or self.step == config.total_steps:
                entry = {"step": self.step, **{k: round(v.item(), 4) for k, v in losses.items()}}
                if self.step % 100 == 0:
                    entry["heldout_loss"] = self.heldout_loss()["loss"]
                self.curve.append(entry)
                bar.show(self.step, entry)
            if self.step == config.joint_steps:  # a usable checkpoint, should phase 3 be cut
                export.export(model, config.out, tokenizer=config.tokenizer)
            if self.step % config.save_every == 0:
                self.save()
        model.set_quantization(weights=True, caches=True)
        self.state_path.unlink(missing_ok=True)

    def joint_step(self) -> dict[str, torch.Tensor]:
        """One step of phase 1 or 2: next-token, MTP and indexer losses."""
        config, model = self.config, self.model
        is_long = self.step >= config.pretrain_steps and self.step % config.long_every == 0
        rows = (config.long_rows, config.long_length) if is_long else (config.rows, config.length)
        tokens = self.texts.batch(config.seed, self.step, *rows, config.chat_share)
        traces: list[AttentionTrace] = []
        streams = model.trunk(tokens, DTYPE, traces)
        loss = cross_entropy(model.logits(streams[:, :-1]), tokens[:, 1:])
        drafted, _ = model.draft(streams[:, :-2], tokens[:, 1:-1])
        mtp_loss = cross_entropy(drafted, tokens[:, 2:])
        index = sum(t.index_loss for t in traces if t.index_loss is not None)
        total = loss + config.mtp_weight * mtp_loss + config.index_weight * index
        self._update(self.optimizer, model.parameters(), total, self._joint_lr())
        return {"loss": loss, "mtp_loss": mtp_loss, "index_loss": index}

    def head_step(self) -> dict[str, torch.Tensor]:
        """One step of phase 3: the head imitates the frozen target, up to three tokens ahead."""
        config, model = self.config, self.model
        if self.generated is None:
            self.generated = self.generate_rows()
        if self.step % 2:
            tokens = self.texts.batch(config.seed, self.step, config.rows, config.length, 0.25)
        else:
            generator = torch.Generator().manual_seed(config.seed * 7919 + self.step)
            count = min(2 * config.rows, len(self.generated))
            picked = torch.randperm(len(self.generated), generator=generator)[:count]
            tokens = self.generated[picked.to(self.generated.device)]
        with torch.no_grad():
            target_streams = model.trunk(tokens, DTYPE)
            target = torch.log_softmax(model.logits(target_streams).float(), dim=-1)
        steps = len(DRAFT_WEIGHTS)
        places = tokens.shape[1] - steps  # every place has all its tokens
        streams, history = target_streams[:, :places], DraftHistory()
        total, losses = 0.0, {}
        for step, weight in enumerate(DRAFT_WEIGHTS):
            ahead = slice(step + 1, step + 1 + places)
            logits, streams = model.draft(streams, tokens[:, ahead], step, history)
            wanted = target[:, ahead]
            divergence = F.kl_div(
                torch.log_softmax(logits.float(), -1), wanted, log_target=True, reduction="none"
            )
            imitation = cross_entropy(logits, wanted.argmax(-1))
            loss = divergence.sum(-1).mean() + imitation
            total = total + weight * loss
            losses[f"head_loss_{step + 1}"] = loss
        self._update(self.head_optimizer, model.mtp.parameters(), total, self._head_lr())
        return losses

    def generate_rows(self) -> torch.Tensor:
        """Greedy continuations of training text, (generated_rows, generated_length)."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed + 17)
        starts = torch.randint(
            0, len(self.texts.plain) - 512, (config.generated_rows,), generator=generator
        )
        prompt = config.generated_length // 4
        prompts = self.texts.windows(self.texts.plain, starts, prompt).tolist()
        chat = self.texts.chat[: config.generated_rows // 4, :prompt].long().tolist()
        prompts[: len(chat)] = chat
        self.model.eval()
        made = greedy(self.model, prompts, config.generated_length - prompt, DTYPE)
        self.model.train()
        rows = [p + m for p, m in zip(prompts, made, strict=True)]
        return torch.tensor(rows, device=config.device)

    def _update(self, optimizer, parameters, loss: torch.Tensor, lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        optimizer.step()
        is_head = optimizer is self.head_optimizer
        for number, (gate, moe) in enumerate(self.model.routers()):
            mtp = moe is self.model.mtp[0].block.ffn
            if mtp or not is_head:
                overload = moe.load - moe.load.mean()
                gate.bias.data -= self.config.bias_rate * overload.sign()
                self.loads[number] = moe.load / moe.load.sum().clamp_min(1)
            moe.load.zero_()

    def _joint_lr(self) -> float:
        config = self.config
        warm = min((self.step + 1) / max(config.warmup_steps, 1), 1.0)
        progress = self.step / max(config.joint_steps, 1)
        return config.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))

    def _head_lr(self) -> float:
        done = (self.step - self.config.joint_steps) / max(self.config.head_steps, 1)
        return self.config.head_lr * min(1.0, 20 * done + 0.05) * (1 - done)

    @torch.no_grad()
    def heldout_loss(self) -> dict[str, float]:
        """Next-token loss and perplexity on held-out documents, MTP loss on the same text."""
        self.model.eval()
        tokens = self.texts.heldout_batch(self.config.rows, self.config.length)
        streams = self.model.trunk(tokens, DTYPE)
        loss = cross_entropy(self.model.logits(streams[:, :-1]), tokens[:, 1:]).item()
        drafted, _ = self.model.draft(streams[:, :-2], tokens[:, 1:-1])
        mtp = cross_entropy(drafted, tokens[:, 2:]).item()
        return {
            "loss": round(loss, 4),
            "perplexity_per_token": round(math.exp(loss), 3),
            "mtp_loss": round(mtp, 4),
            "tokens": tokens.numel(),
        }

    def save(self) -> None:
        """Write everything that a continued run needs; renamed into place."""
        state = {
            "config": repr(self.config),
            "step": self.step,
            "curve": self.curve,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "head_optimizer": self.head_optimizer.state_dict(),
            "generated": self.generated,
        }
        temporary = self.state_path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.rename(self.state_path)

    def resume(self) -> None:
        """Continue from the state file, if one was written by a run with the same options."""
        if not self.state_path.is_file():
            return
        state = torch.load(self.state_path, map_location=self.config.device, weights_only=True)
        if state["config"] != repr(self.config):
            raise ValueError(
                f"train: {self.state_path} is from a run with other options; remove it to start "
                "over"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.head_optimizer.load_state_dict(state["head_optimizer"])
        self.step, self.curve = state["step"], state["curve"]
        self.generated = state["generated"]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood; logits (B, L, vocab), labels (B, L)."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def expert_load(trainer: Trainer) -> list[list[float]]:
    """Share of tokens per expert in the last step, one list per learned router, MTP last."""
    return [[round(x, 4) for x in trainer.loads[i].tolist()] for i in sorted(trainer.loads)]


def evaluate(folder: Path, prompts: Path, device: str, max_tokens: int) -> dict[str, object]:
    """Figures of an exported checkpoint: acceptance for k = 1..3, the shuffled control, samples."""
    words = tokenizer.load(folder)
    model = load.load(folder, device)
    ids = data.read_prompts(prompts, words)
    made = greedy(model, ids, max_tokens + 3, DTYPE)
    figures: dict[str, object] = {
        "prompts": len(ids),
        "max_tokens": max_tokens,
        "dtype": "bfloat16",
        "acceptance": [
            acceptance(model, ids, k, max_tokens, DTYPE, made).to_dict() for k in (1, 2, 3)
        ],
    }
    with tempfile.TemporaryDirectory() as scratch:
        export.shuffle_mtp_experts(folder, Path(scratch) / "shuffled", seed=0)
        control = load.load(Path(scratch) / "shuffled", device)
    figures["acceptance_shuffled_experts"] = acceptance(
        control, ids, 1, max_tokens, DTYPE, made
    ).to_dict()
    chat = [tokenizer.chat_prompt(u) for u in (*data.OPENERS[:4], "Continue: She was very happy")]
    chat_ids = [words.encode(c, add_special_tokens=False).ids for c in chat]
    answers = greedy(model, chat_ids, max_tokens, DTYPE)
    eos = model.config.eos_token_id
    figures["chat_samples"] = [
        {
            "prompt": c.split("｜>")[2].split("<")[0],
            "answer": words.decode(a[: a.index(eos)] if eos in a else a),
            "finish_reason": "stop" if eos in a else "length",
        }
        for c, a in zip(chat, answers, strict=True)
    ]
    figures["text_samples"] = [
        {"prompt": words.decode(p)[-200:], "continuation": words.decode(m)}
        for p, m in list(zip(ids, made, strict=True))[:4]
    ]
    return figures


def provenance(config: TrainConfig) -> dict[str, object]:
    """Commit, device, versions, command, seed and checkpoint digest of a run."""
    is_cuda = config.device.startswith("cuda")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": config.commit or git_commit(),
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": "python -m tiny " + " ".join(sys.argv[1:]),
        "seed": config.seed,
        "checkpoint_sha256": export.checkpoint_sha256(config.out),
    }


def git_commit() -> str:
    """HEAD, with `+dirty` when tracked files differ; `unknown` outside a git checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "HEAD")
    dirty = git("status", "--porcelain", "--untracked-files=no")
    return (head + ("+dirty" if dirty else "")) if head else "unknown"


class Progress:
    """A bar with losses, speed and time left, on standard error."""

    def __init__(self, total: int, first: int) -> None:
        self.total, self.first, self.started = total, first, time.time()

    def show(self, step: int, entry: dict[str, float]) -> None:
        """Redraw; on anything but a terminal, print a line."""
        pace = (time.time() - self.started) / max(step - self.first, 1)
        left = int(pace * (self.total - step))
        filled = 24 * step // max(self.total, 1)
        losses = " ".join(f"{k} {v:.3f}" for k, v in entry.items() if k != "step")
        bar = "#" * filled + "." * (24 - filled)
        line = f"[{bar}] {step}/{self.total} {losses} {pace * 1e3:.0f} ms/step"
        line += f", {left // 60}:{left % 60:02d} left"
        end = "\r" if sys.stderr.isatty() and step < self.total else "\n"
        print(f"{line:<110}", end=end, file=sys.stderr, flush=True)
