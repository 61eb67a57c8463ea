"""The smallest task that can be: clouds of points around three centers. The tests train it; a sixth task looks so."""
