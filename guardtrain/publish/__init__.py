"""Put a guard where others find it: what is true of it, its model card, and the push to the Hugging Face Hub."""
