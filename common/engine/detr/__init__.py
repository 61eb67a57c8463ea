"""What transformers that predict a set need: boxes, positions, padding, matching. No layers, no task."""
