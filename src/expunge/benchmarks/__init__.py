"""Published protocols: data, target recipe and metrics, declared."""
