"""How to learn: losses, the step, the loop, optimizers, checkpoints, metrics, methods."""
