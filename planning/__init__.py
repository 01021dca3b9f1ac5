"""What a run will cost and whether it can work: arithmetic on a configuration, without torch."""
