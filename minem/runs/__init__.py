"""A run on disk: its directory, its stages, and how it resumes."""
