"""What measures and attacks a model, and judges it."""
