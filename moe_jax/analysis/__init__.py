"""Analysis: costs, traces of what routers chose, reports and figures."""
