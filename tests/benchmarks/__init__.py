"""What the package costs in time and memory, as ratios to what is there without it."""
