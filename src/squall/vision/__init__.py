"""Models that see: images, and what towers make of them."""
