"""Where texts, pairs, examples with a class and questions come from."""
