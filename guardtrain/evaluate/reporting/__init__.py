"""The report of an evaluation: what was found, for someone who did not train the guard. Shape suffix: N rows."""
