"""Hugging Face's classes and names."""
