"""One engine life with capture on: `run_capture.py JOB.json RESULT.npz`.

JOB: {"model", "folder", "requests": [{"ids", "max_tokens"}], "budget_bytes", "small_budget_bytes"}.
Generates request 0 before anything records, then each request alone, committed on its own, then
request 0 with the small budget into `folder`/small, then request 0 when nothing records any more.
RESULT: for request i `tokens_i`; `answers`, JSON of the plugin's answers in order.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from retrofit.control import CONTROL, Action, Answer, Order, read_answer, write

TIMEOUT_S = 300


def give(folder: Path, request: str, action: Action, budget_bytes: int, **meta) -> Answer:
    """Give the plugin an order and wait for its answer."""
    write(folder / CONTROL, Order(request, action, budget_bytes, meta))
    deadline = time.monotonic() + TIMEOUT_S
    while (answer := read_answer(folder)) is None or answer.request != request:
        if time.monotonic() > deadline:
            raise RuntimeError(f"no answer to {action}")
        time.sleep(0.01)
    return answer


def main(job_file: str, result_file: str) -> None:
    from vllm import LLM, SamplingParams

    job = json.loads(Path(job_file).read_text())
    folder, budget = Path(job["folder"]), job["budget_bytes"]
    llm = LLM(
        job["model"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_num_seqs=4,
        max_model_len=4096,
        enable_prefix_caching=False,
        speculative_config={
            "method": "mtp",
            "num_speculative_tokens": 1,
            "disable_padded_drafter_batch": True,
        },
    )

    def generate(request) -> list[int]:
        parameters = SamplingParams(
            temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False
        )
        prompt = {"prompt_token_ids": request["ids"]}
        return list(llm.generate([prompt], [parameters])[0].outputs[0].token_ids)

    requests, result, answers = job["requests"], {}, []
    generate(requests[0])  # not asked for
    answers.append(give(folder, "begin", Action.BEGIN, budget))
    for number, request in enumerate(requests):
        result[f"tokens_{number}"] = np.array(generate(request))
        answers.append(give(folder, f"commit {number}", Action.COMMIT, budget, done=number))
    generate(requests[0])  # dropped: never committed
    answers.append(give(folder, "small", Action.BEGIN, job["small_budget_bytes"]))
    generate(requests[0])
    answers.append(give(folder, "over", Action.COMMIT, job["small_budget_bytes"]))
    answers.append(give(folder, "stop", Action.STOP, budget))
    generate(requests[0])
    answers.append(give(folder, "late", Action.COMMIT, budget))
    result["answers"] = np.array(json.dumps([asdict(answer) for answer in answers]))
    with Path(result_file).open("wb") as file:
        np.savez(file, **result)


if __name__ == "__main__":
    main(*sys.argv[1:])
