"""From files to checked rows: read any usual format, find every problem in one pass, and split without leaks.

problems   what is wrong, where, and how bad it is
records    files to raw records (JSONL, JSON, CSV, Parquet, `datasets`)
columns    their column names and label words to ours
rows       a raw record to a GuardExample or ChatExample
sources    the sources of a recipe to rows
checks     what a set of rows must satisfy before a model may see it
splits     held-out rows and subsets
template   rows to token segments; packing and collate: segments to batches
report     `guardtrain data check`
"""
