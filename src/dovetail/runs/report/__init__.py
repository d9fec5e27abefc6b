"""The report of a run: its record, its page and its summary on a terminal."""
