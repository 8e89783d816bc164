"""What `--web` serves: address.py, views.py and board.py (pure) say what, subjects.py collects it,
metrics.py has it for Prometheus, server.py is HTTP. Read only: nothing can be changed from here."""
