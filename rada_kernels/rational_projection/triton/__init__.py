"""The rational projection in Triton: state (what it leaves to the next steps), forward, backward."""
