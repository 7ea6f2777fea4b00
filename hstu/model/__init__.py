"""Encoders over jagged batches, the retrieval model around them, and the losses."""
