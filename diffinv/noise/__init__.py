"""Layer 1: noise models."""
