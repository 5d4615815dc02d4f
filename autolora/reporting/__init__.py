"""Results for people: reads what runs have written, never trains."""
