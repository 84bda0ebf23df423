"""What this project adds to vLLM on an NVIDIA GPU."""
