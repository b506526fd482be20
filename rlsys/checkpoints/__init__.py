"""Checkpoints on disk: complete or not there, and proven by checksums before they are read."""
