"""Layer 4: uncertainty."""
