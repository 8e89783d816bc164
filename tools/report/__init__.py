"""One page about one migration: recorder.py collects, page.py and charts.py (pure) draw, writing.py
puts it on disk. Knows reports and events (query-migrate's names), not how they come about."""
