"""Raw logs -> sequence store -> jagged batches."""
