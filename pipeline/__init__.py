"""The decisions, and the migration as a whole. May use workers and transport; knows no terminal."""
