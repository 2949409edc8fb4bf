# One gateway worker; run two or more. Build from the repository root:
#   docker build -f deploy/docker/gateway.Dockerfile -t onebox-gateway .
FROM python:3.11-slim-bookworm
RUN useradd --create-home --uid 10001 onebox
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY onebox onebox
COPY plugins plugins
COPY agents agents
RUN pip install --no-cache-dir uv && uv pip install --system --no-cache --editable ".[gateway]"
USER onebox
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 ONEBOX_HOST=0.0.0.0
EXPOSE 8080
HEALTHCHECK CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz')"]
CMD ["python", "-m", "agents"]
