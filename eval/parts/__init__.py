"""What the commands of this room share."""
