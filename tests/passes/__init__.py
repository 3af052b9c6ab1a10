"""One test file per pass, and one per analysis."""
