"""What the Triton kernels of all steps share: their dialect, the devices, launch configurations and launches."""
