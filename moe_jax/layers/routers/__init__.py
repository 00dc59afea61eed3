"""The routers: their parameters and options, of one level and of two."""
