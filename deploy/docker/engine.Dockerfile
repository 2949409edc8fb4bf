# One engine fleet: Ray Serve with vLLM replicas. Build from the repository root:
#   docker build -f deploy/docker/engine.Dockerfile --build-arg EXTRA=cpu -t onebox-engine .
FROM python:3.11-slim-bookworm
ARG EXTRA=gpu
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libnuma1 \
 && rm -rf /var/lib/apt/lists/* && useradd --create-home --uid 10001 onebox
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY onebox onebox
RUN pip install --no-cache-dir uv \
 && uv pip install --system --no-cache $([ "$EXTRA" = cpu ] && echo --torch-backend=cpu) --editable ".[${EXTRA}]"
COPY serving serving
COPY deploy deploy
USER onebox
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 ONEBOX_HOME=/home/onebox/.onebox
VOLUME /home/onebox/.onebox
EXPOSE 8100
CMD ["sh", "-c", "python -m serving.fetch \"${ONEBOX_MODEL:-auto}\" && exec python -m deploy.fleet"]
