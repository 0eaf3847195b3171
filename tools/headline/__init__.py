"""Speed and quality of whole loops: schedules of a bundle beside what a user of diffusers would pick instead."""
