"""What a run needs before it starts: memory, time, money. Pure formulas, no torch."""
