"""Tasks: records of a known kind, where they come from, tokens, and scores."""
