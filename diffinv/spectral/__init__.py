"""Spectra: physical models, what an instrument makes of them, and mock cubes."""
