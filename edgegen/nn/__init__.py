"""Blocks, losses and feature extractors that models, passes and metrics share."""
