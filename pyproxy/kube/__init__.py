"""The API server: what to ask it, and what its answers mean."""
