"""Models in and out of folders: options, quantizing while loading, placement, saving."""
