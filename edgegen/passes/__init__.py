"""One file a unit; the file name is the name users type."""
