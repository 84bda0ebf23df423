"""A DeepSeek-V4 of 19 million parameters: plain PyTorch model, trainer, exporter, checkpoint."""
