"""Engine replicas: the wire, the engines, their ASGI server, the Serve deployment, the model catalogue."""
