"""Controls: who looks at the forget examples as they are forgotten."""
