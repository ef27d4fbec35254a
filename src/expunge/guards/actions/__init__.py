"""What is done once a detector has noticed something."""
