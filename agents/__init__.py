"""The gateway: API, router, executor, store, conversations, keys."""
