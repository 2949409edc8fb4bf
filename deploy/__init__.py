"""The launcher and supervisor, and the files for servers and clusters."""
