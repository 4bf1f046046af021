"""Candidates of each row of scores: all that can be among its k best, and few more."""
