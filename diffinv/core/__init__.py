"""Layer 0: batches, random streams, linear algebra, checks and the registry; imports nothing above it."""
