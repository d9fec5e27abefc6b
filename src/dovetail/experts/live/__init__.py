"""Task experts in a live model: activated, replaced and removed in place."""
