"""Side by side with others: the same rows, model, optimiser and dtype under this project's trainer and under its peers'."""
