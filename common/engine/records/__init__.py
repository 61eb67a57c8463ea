"""What a run leaves, where its number comes from, and the tables and figures made of it."""
