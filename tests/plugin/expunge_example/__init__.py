"""An example of a package that extends Expunge; its entry points are in pyproject.toml."""
