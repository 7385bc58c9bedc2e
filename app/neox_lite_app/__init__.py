"""What users touch: the command line, and what its commands do."""
