"""Generation: what can be asked for, sampling, one request, passes over many, drafts. Knows no model class."""
