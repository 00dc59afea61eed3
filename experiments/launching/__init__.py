"""Items of `experiments.launch`, and the processes that run them."""
