"""What a calibration found, as one HTML file."""
