"""The machinery of studies: arms, runs, results, claims, tables."""
