"""One life of the patched engine, in a process of its own: `run_engine.py JOB.json RESULT.npz`.

JOB: {"model", "engine": vLLM arguments, "requests": [{"ids": [...], "max_tokens", "logprobs"}],
      "batches": [[request indices generated together], ...]}
logprobs: null, a count of best tokens, "output" (every token), or "all" (the prompt's too).
RESULT: for request i `tokens_i`; where logprobs were asked, `output_i` (tokens, vocabulary), NaN
where not known, and with "all" `prompt_i` (positions, vocabulary); `counters`, JSON of vLLM's
speculation counters; `ops`, JSON of `chosen_ops()`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

# vLLM's word for every token of the vocabulary.
COUNTS = {"output": -1, "all": -1}


def dense(rows: Any, width: int) -> np.ndarray:
    """vLLM's list of {token id: Logprob} as float32 (positions, width); None becomes NaN."""
    table = np.full((len(rows), width), np.nan, dtype=np.float32)
    for position, row in enumerate(rows):
        for token, entry in (row or {}).items():
            table[position, token] = entry.logprob
    return table


def main(job_file: str, result_file: str) -> None:
    from vllm import LLM, SamplingParams

    job = json.loads(Path(job_file).read_text())
    engine = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_num_seqs": 8,
        "max_model_len": 4096,
        "max_logprobs": -1,
        "disable_log_stats": False,
        "enable_prefix_caching": False,
        **job["engine"],
    }
    llm = LLM(job["model"], **engine)
    width = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    result: dict[str, np.ndarray] = {}
    requests = job["requests"]
    for batch in job.get("batches", [list(range(len(requests)))]):
        prompts = [{"prompt_token_ids": requests[i]["ids"]} for i in batch]
        parameters = [
            SamplingParams(
                temperature=0,
                max_tokens=requests[i]["max_tokens"],
                ignore_eos=True,
                detokenize=False,
                logprobs=COUNTS.get(requests[i]["logprobs"], requests[i]["logprobs"]),
                prompt_logprobs=-1 if requests[i]["logprobs"] == "all" else None,
            )
            for i in batch
        ]
        for i, output in zip(batch, llm.generate(prompts, parameters), strict=True):
            completion = output.outputs[0]
            result[f"tokens_{i}"] = np.array(completion.token_ids)
            if requests[i]["logprobs"]:
                result[f"output_{i}"] = dense(completion.logprobs, width)
            if requests[i]["logprobs"] == "all":
                result[f"prompt_{i}"] = dense(output.prompt_logprobs, width)
    counters = {
        metric.name.removeprefix("vllm:"): getattr(metric, "value", None)
        if hasattr(metric, "value")
        else metric.values
        for metric in llm.get_metrics()
        if "spec_decode" in metric.name
    }
    from kernels.cpu.ops import chosen_ops

    result["ops"] = np.array(json.dumps(chosen_ops()))
    result["counters"] = np.array(json.dumps(counters))
    with Path(result_file).open("wb") as file:
        np.savez(file, **result)


if __name__ == "__main__":
    main(*sys.argv[1:])
