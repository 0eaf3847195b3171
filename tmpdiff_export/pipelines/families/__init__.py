"""What differs between denoiser classes: how they are called, wrapped for export, and conditioned."""
