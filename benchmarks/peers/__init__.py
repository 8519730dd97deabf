"""edgegen beside what a user would pick instead; see run.py."""
