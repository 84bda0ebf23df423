"""Time our W4A16 MoE kernels beside vLLM's Marlin on this GPU: `python -m bench.kernels`."""
