"""Accuracy: scored tasks, greedy parity, paired comparison. `python -m bench eval`."""
