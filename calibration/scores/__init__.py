"""What each step suffers from each precision, and what schedules are predicted to cost."""
