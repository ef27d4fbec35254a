"""Evidence for people: HTML, JSON, terminal."""
