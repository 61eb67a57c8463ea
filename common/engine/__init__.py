"""What the five tasks of this repository share to reproduce tables; not part of the installed library `dr2net`.

    config, weights, data, synthetic  <-  backbones, records  <-  training  <-  commands

A part imports only what stands left of it, and its own; common/tests/test_repository.py checks it.
"""
