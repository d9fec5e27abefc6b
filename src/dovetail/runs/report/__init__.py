"""The report of a run: `report.json` as a checked record, its page and its summary for people."""
