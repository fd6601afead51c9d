"""Cubes of spectra to maps of physical parameters with their errors."""
