"""Weights in and out: the folders of diffusers in which Karlo and its kin are published."""
