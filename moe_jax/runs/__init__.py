"""What keeps a run alive and visible: workdir, checkpoints, rows, watch."""
