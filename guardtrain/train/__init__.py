"""Train a recipe: on this machine, or on each rank that `accelerate launch -m guardtrain.train` starts."""
