"""Problems, their division into pools, decontamination, and prompts as tokens."""
