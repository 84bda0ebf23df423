"""Load on a running server: prompts of known length, streamed requests, results with intervals."""
