"""Step 3 of 3: attended rows → mask → masked sums over the embedding, and each image's deviation |M - 1|."""
