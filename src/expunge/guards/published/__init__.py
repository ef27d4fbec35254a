"""Guards by name, one small file each."""
