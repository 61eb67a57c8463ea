"""Synthetic data in the real formats: sprites, motion, drawn clips. Pure functions of a seed."""
