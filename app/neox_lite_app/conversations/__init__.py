"""What a conversation is, how it is put to a model, and where it is kept. Knows no page and no protocol."""
