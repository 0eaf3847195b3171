"""AOTInductor packages for an NVIDIA GPU, or for the CPU."""
