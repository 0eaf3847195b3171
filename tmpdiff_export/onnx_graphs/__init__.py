"""The exported graph: tracing, shape folding, Q/DQ nodes."""
