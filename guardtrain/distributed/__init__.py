"""Several ranks as one run: joining, agreeing, DeepSpeed's configuration, checkpoints that can be trusted."""
