"""The public package: what a plugin author or an API client imports."""

__version__ = "0.1.0"
