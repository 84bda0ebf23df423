"""`ENGINE=lm-eval`: hand the same endpoint to lm-evaluation-harness, where that is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from bench.eval.config import EvalConfig, Reasoning, TaskName
from bench.load.errors import LoadError, Unbelievable
from bench.load.progress import say
from bench.load.server import ServerFacts

PROGRAM = "lm_eval"
# Its MMLU over log-probabilities does not go through a chat route; the generative one does.
TASKS = {
    TaskName.GSM8K: "gsm8k_cot_zeroshot",
    TaskName.GSM8K_8SHOT: "gsm8k_cot",
    TaskName.MMLU: "mmlu_generative",
    TaskName.HUMANEVAL: "humaneval_instruct",
}
# It runs HumanEval's programs without a sandbox.
DEFAULT_TASKS = (TaskName.GSM8K, TaskName.GSM8K_8SHOT, TaskName.MMLU)
# It fetches its own data.
NOT_ITS = ("contexts", "gsm8k", "mmlu", "humaneval", "sandbox_image")


def command(
    config: EvalConfig, facts: ServerFacts, output: Path, program: str = PROGRAM
) -> list[str]:
    """Its arguments for what `config` asks.

    Raises:
        LoadError: a task or setting that it does not have, or one that it would run without a
            sandbox.
    """
    for name in NOT_ITS:
        if getattr(config, name):
            raise LoadError(f"{name}: is not for lm-evaluation-harness, which has data of its own")
    names = config.tasks or DEFAULT_TASKS
    for name in names:
        if name not in TASKS:
            raise LoadError(f"{name.value}: lm-evaluation-harness has no such task; it has "
                            f"{', '.join(t.value for t in TASKS)}")  # fmt: skip
    if TaskName.HUMANEVAL in names:
        raise LoadError("humaneval: lm-evaluation-harness runs programs without a sandbox; "
                        "ours has one (ENGINE=own)")  # fmt: skip
    arguments = [
        f"base_url={config.url.rstrip('/')}/v1/chat/completions",
        f"model={facts.model}",
        f"num_concurrent={config.streams}",
        "max_retries=3",
        f"timeout={config.timeout_s:.0f}",
    ]
    generation: dict[str, Any] = {
        "temperature": config.temperature,
        "max_gen_toks": config.answer_tokens(facts.window),
    }
    if config.reasoning is not Reasoning.AUTO:
        generation["chat_template_kwargs"] = {"thinking": config.reasoning is Reasoning.ON}
    return [
        program, "--model", "local-chat-completions", "--model_args", ",".join(arguments),
        "--tasks", ",".join(TASKS[name] for name in names), "--apply_chat_template",
        "--gen_kwargs", json.dumps(generation), "--seed", str(config.seed), "--log_samples",
        "--output_path", str(output.with_suffix("")),
        *(["--limit", str(config.limit)] if config.limit else []),
    ]  # fmt: skip


def run(config: EvalConfig, facts: ServerFacts, output: Path, api_key: str | None) -> None:
    """Run it; what it prints and writes is its own.

    Raises:
        LoadError: it is not installed.
        Unbelievable: it ended with another exit status than 0.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise LoadError(
            f"{PROGRAM} is not installed; pip install 'lm-eval[api]' in an environment of its own, "
            "and have it on PATH"
        )
    arguments = command(config, facts, output, program)
    say(" ".join(arguments))
    environment = os.environ | {"OPENAI_API_KEY": api_key or "none"}
    status = subprocess.run(arguments, env=environment, check=False).returncode
    if status:
        raise Unbelievable(f"{PROGRAM}: exit status {status}")
    say(f"{PROGRAM}: its results are in {output.with_suffix('')}")
