"""Models: loading, what trains in them, the loss, and what precision the hardware can do."""
