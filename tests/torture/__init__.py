"""Random faults against small real runs: `python -m torture` (see `__main__`)."""
