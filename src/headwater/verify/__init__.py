"""Answers: extraction, equality, verifiers in killable workers, and the label vault."""
