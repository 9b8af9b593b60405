"""The vocabulary of a run: recipes, catalog, and the files of a job. Standard library, pydantic and PyYAML only."""
