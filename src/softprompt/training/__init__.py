"""Training: the loop, the step, its setup and its end, checkpoints, processes and callbacks."""
