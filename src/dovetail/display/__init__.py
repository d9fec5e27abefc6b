"""Words, numbers and pictures for people: what every table, page and plot uses."""
