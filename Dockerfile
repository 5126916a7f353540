# One file, two images; build with `docker build --target gateway .` or `--target worker .`.
#   gateway  serves; holds neither torch nor an engine, and no code of the worker
#   worker   distils on an NVIDIA GPU; holds vLLM too, so the engines run from the same image
# The gateway listens on loopback unless BONSAI_HOST says otherwise; engines are reached over loopback or Unix sockets only:
# put them into the same network namespace. BONSAI_ADMIN_KEY_FILE and BONSAI_KEY_PEPPER_FILE must exist (docs/api.md).
# Run both with a read-only root file system and without capabilities: all they write goes to volumes.

FROM python:3.11.14-slim-bookworm AS base
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Numeric, so that Kubernetes can see that it is not root.
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin bonsai
WORKDIR /app

FROM base AS gateway
COPY requirements/gateway.txt requirements/
RUN pip install --no-deps --require-hashes -r requirements/gateway.txt
COPY bon_algos bon_algos
COPY archive archive
COPY service service
USER 10001:10001
CMD ["python", "-m", "service"]

FROM base AS worker
# Triton builds its launchers with the C compiler when it first runs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY requirements/cuda.txt requirements/
RUN pip install --no-deps torch==2.13.0 && pip install --no-deps --require-hashes -r requirements/cuda.txt
COPY bon_algos bon_algos
COPY archive archive
COPY worker worker
USER 10001:10001
# A stop is then a soft one: the job keeps its last checkpoint and moves on to the next worker.
ENV REMAP_SIGTERM=SIGQUIT
CMD ["python", "-m", "celery", "-A", "worker.app", "worker", "-c", "1", \
    "--without-gossip", "--without-mingle", "--loglevel", "INFO"]
