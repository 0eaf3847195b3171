"""From scores to a schedule: predictions, allocation under a budget, candidates, the guard."""
