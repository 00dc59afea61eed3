"""Configs of runs; each file changes values of `base.py`."""
