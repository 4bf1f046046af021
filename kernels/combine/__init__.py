"""The best of candidates in order, and of the sums of two halves."""
