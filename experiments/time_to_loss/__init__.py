"""Models of the study `switch_speed`, their choice, and annealed runs."""
