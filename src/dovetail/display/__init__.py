"""Text, tables, plots and pages for people: the parts that every room shares."""
