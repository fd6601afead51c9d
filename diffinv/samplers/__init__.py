"""Layer 4: samplers."""
