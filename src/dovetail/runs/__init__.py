"""Runs: one recipe, from loading to the report."""
