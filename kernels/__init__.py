"""Weights and number formats of DeepSeek-V4, operators, and what vLLM loads of ours."""
