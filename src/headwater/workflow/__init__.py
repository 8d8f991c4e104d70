"""A study as a graph of stages: planned, stored, executed and resumed."""
