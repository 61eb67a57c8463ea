"""The training loop and what it needs: fit, checkpoints, optimization, methods, plan, log, signals."""
