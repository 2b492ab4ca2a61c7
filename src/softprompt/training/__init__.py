"""Training: the loop, the step, setup and finalization, checkpoints, processes and callbacks."""
