"""Stores of task experts: local folders and HTTP servers, with a bounded cache."""
