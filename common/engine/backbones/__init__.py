"""Backbones with public weights: thin adapters over timm and transformers that turn a clip into tokens (B, N, D).

Each keeps its residual blocks in a container called `blocks`, which is what `dr2net.convert` looks for.
"""
