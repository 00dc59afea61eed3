"""The runs that `experiments/soak.py` makes, disturbances, checks of traces."""
