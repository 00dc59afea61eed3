"""Models, arms and rows of the study `switch_speed`."""
