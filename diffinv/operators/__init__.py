"""Layer 1: forward operators."""
