"""How far a bundle's latents and pictures are from those of diffusers, over everything that a user can set."""
