"""HTML and Markdown reports, pictures, comparison."""
