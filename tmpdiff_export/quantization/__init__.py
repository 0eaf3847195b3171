"""From weights and ranges to codes and scales; no graph, no backend."""
