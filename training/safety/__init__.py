"""What a run survives: checkpoints, resume, signals, ranks, disks, divergence."""
