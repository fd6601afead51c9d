"""Layer 2: denoisers."""
