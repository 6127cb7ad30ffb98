"""Mean-field theory beside random networks: `python -m gallery.theory` prints the tables of docs/theory.md."""
