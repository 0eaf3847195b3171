"""From scores to a schedule: allocation under a budget, rivals, fixed rules."""
