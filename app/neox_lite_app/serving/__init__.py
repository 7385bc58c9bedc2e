"""One model for many callers: the engine, and the OpenAI-compatible API over it."""
