"""The machinery of the simulated studies of FasterMoE."""
