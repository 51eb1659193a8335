"""What the Triton kernels become without a GPU: recorded launches, their machine code, predicted times, a report."""
