"""From the sections of a configuration to the objects that they name."""
