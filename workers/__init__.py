"""One process, one job, on guest memory. May use transport; knows no decision and no display."""
