"""What a person reads about a run: the HTML report, charts, tables, samples."""
