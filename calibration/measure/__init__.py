"""Runs of the loop and what they measure: errors of final latents, pictures, latencies."""
