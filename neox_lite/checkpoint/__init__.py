"""Weight files: strict reading, memory mapping, atomic writing; EleutherAI's layer files and LoRA adapters."""
