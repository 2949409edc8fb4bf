"""The public HTTP API, one module per resource."""
