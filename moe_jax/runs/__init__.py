"""Work folder, checkpoints, metrics and supervision of a run."""
