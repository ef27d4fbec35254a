"""The one training loop and the parts of which methods are composed."""
