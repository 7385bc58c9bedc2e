"""Models larger than a GPU, or than memory: where each part goes, and how it is run from there."""
