"""Published methods, one small file each, and the loss terms they share."""
