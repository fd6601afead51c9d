"""Layer 3: guidance, one method a file."""
