"""The programme of 1991: its cases, runs, measures, rows and figures."""
