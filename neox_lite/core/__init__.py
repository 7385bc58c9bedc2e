"""A model without Hugging Face: the tree of modules, the kernels bound to it, and arguments as packed tokens."""
