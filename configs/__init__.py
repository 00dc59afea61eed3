"""What one run is: each file changes `base.py` where it differs."""
