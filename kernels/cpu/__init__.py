"""DeepSeek-V4 on a CPU: what vLLM 0.32.0 lacks there, as plain PyTorch."""

# Below "vllm", the only name for which vLLM configures a handler.
LOGGER = "vllm.plugins.dsv4_maxq"
