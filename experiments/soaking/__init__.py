"""What the soak runs, and what it concludes from what is left."""
