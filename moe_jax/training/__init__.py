"""Training: state, losses, optimizer, the pure step, and the loop around it."""
