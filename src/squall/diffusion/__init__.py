"""Models that make pictures: FLUX.1."""
