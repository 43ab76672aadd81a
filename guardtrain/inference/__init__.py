"""Run a guard: scores in every mode, reasons, over one shared policy cache. Used by train, evaluate and serve."""
