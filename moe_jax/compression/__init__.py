"""Sparse models made small: distilled, extracted, merged, pruned, quantised."""
