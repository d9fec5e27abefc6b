"""Task experts in a live model: activated, replaced and taken out in place."""
