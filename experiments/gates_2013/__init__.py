"""Measures and pictures of gates for the study of 2013, `eigen_2013.py`."""
