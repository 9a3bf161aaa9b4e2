"""Training: the loop, its checkpoints and what a run writes down about itself."""
