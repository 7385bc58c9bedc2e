"""What a model is worth: perplexity, distance from its source, and tasks of lm-evaluation-harness."""
