"""Tables, pictures and comparisons of recorded rows, and the paper's figures."""
