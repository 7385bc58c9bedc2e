"""The models there are: in the world, on this machine, as files, and what they take to run."""
