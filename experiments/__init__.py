"""Studies: one file per question or published table, each one command."""
