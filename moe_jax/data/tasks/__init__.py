"""What is learned of texts, pairs and examples: the rows of each task."""
