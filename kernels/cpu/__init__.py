"""DeepSeek-V4 on a CPU: what vLLM 0.32.0 lacks there, as plain PyTorch."""
