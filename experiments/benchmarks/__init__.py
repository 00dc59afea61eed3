"""The machinery of benchmarks: cases, programs, timing, tables."""
