"""Documentation derived from the code: one module per group of pages, each returning a mapping from path to text."""
