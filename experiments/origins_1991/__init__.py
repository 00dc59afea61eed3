"""Cases, runs, measures and figures of the study of 1991, `jacobs_table1`."""
