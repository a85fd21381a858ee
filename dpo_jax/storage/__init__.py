"""Files that are whole or not there, rows, locks, and places elsewhere."""
