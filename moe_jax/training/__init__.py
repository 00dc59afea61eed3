"""Training: state, losses, optimizer, the pure step, the loop around it."""
