"""The registry, and the built-in tasks with their prompts."""
