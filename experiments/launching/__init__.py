"""Processes, topologies and job files of `experiments.launch`."""
