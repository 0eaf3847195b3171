"""From a pipeline folder to a bundle folder."""
