"""Measurements on a GPU; with this file, `benchmarks.gpu` is the room and not the command of the same name."""
