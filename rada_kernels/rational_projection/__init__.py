"""Step 1 of 3: features → queries, keys and values over the rational matrix."""
