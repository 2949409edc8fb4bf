# The page. Build from the repository root:
#   docker build -f deploy/docker/ui.Dockerfile -t onebox-ui .
FROM python:3.11-slim-bookworm
RUN useradd --create-home --uid 10001 onebox
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY onebox onebox
COPY ui ui
RUN pip install --no-cache-dir uv && uv pip install --system --no-cache --editable ".[ui]"
USER onebox
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 ONEBOX_HOST=0.0.0.0
EXPOSE 7860
CMD ["python", "-m", "ui"]
