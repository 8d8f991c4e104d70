"""Models leave a run: which one, as what, with what is known of it."""
