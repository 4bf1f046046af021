"""Points, rows, their files, and the environment they were measured in."""
