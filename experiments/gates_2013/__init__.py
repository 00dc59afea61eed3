"""The programme of 2013: what gates of two layers go by, and pictures."""
