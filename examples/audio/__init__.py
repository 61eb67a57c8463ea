"""Audio: a speech recognizer's encoder learns which drum it hears, in drum kits that it has never heard."""
