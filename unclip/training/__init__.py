"""The training loop, checkpoints and EMA."""
