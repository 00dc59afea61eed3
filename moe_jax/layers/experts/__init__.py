"""Who multiplies the rows of experts: slots, sorted rows, few tokens."""
