"""Text: a sentence encoder of six layers learns to what kind of thing a dictionary's definition belongs."""
