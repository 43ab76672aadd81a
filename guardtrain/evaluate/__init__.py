"""Measure a guard: pure scores, the runner over a data file, and the baseline it must beat."""
