"""Analysis of models and runs: costs, traces of routers' choices, figures."""
