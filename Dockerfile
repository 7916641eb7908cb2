# docker build --build-arg ACCELERATOR=tpu -t tnt_jax .     (or cuda13, or cpu)
# Not built by this project's CI, which has no Docker engine.
FROM python:3.13-slim
ARG ACCELERATOR=tpu
# The functions for CPUs are compiled where they run.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /tnt_jax
COPY requirements.txt ./
RUN if [ "$ACCELERATOR" = cpu ]; then pip install --no-cache-dir -r requirements.txt; \
    else pip install --no-cache-dir -r requirements.txt "jax[$ACCELERATOR]>=0.10.2,<0.13"; fi
COPY . .
RUN pip install --no-cache-dir --no-deps .
# Signals reach the command itself, which saves and exits with 75.
ENTRYPOINT ["python", "train.py"]
