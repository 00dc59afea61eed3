"""Machines, counts and simulated arms of FasterMoE; arms of its gate."""
