"""The logit reduction in Triton: state (what it returns), forward, backward."""
