"""Models in and out: loading, merging, footprints, saved adapters, packed models and other libraries' formats."""
