"""Step 2 of 3: queries, keys and values → one attended row per class, by a softmax over all pairs of classes."""
