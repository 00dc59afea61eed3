"""Moves the rows of experts between devices, and predicts what that costs."""
