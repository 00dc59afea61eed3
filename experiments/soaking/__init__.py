"""Runs that soak.py and kills.py watch, how they are disturbed, and checks."""
