# Squall on CPUs: docker run -p 8080:8080 -v models:/models squall MODEL; docs/install.md.
FROM python:3.13-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY CMakeLists.txt LICENSE README.md pyproject.toml ./
COPY native native
COPY src src
RUN python -m venv /opt/squall && /opt/squall/bin/pip install --no-cache-dir .

FROM python:3.13-slim-bookworm
RUN useradd --create-home --uid 1000 squall && install -d -o squall /models
COPY --from=build /opt/squall /opt/squall
ENV PATH="/opt/squall/bin:$PATH" HF_HOME=/models
USER 1000
WORKDIR /models
VOLUME /models
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s --timeout=5s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health')"]
ENTRYPOINT ["squall", "serve", "--serve-ip", "0.0.0.0", "--port", "8080"]
