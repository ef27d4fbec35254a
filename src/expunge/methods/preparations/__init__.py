"""What methods make from the target and the data before training."""
