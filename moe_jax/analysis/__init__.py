"""Analysis: costs, traces of routers' choices, reports and figures."""
