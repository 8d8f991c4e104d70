"""What a person sees of a finished run: results.json, the page, the terminal, the rollouts."""
