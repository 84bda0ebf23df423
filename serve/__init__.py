"""Serve a DeepSeek-V4 checkpoint with the patched vLLM: profiles, preflight, gateway, watchdog."""
