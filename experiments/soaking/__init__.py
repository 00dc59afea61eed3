"""The runs that `experiments/soak.py` disturbs, and checks of their traces."""
