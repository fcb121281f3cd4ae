# An image of this package for TPU slices (by default) or other accelerators.
#
#   docker build -t IMAGE --build-arg REVISION=$(git rev-parse HEAD) .
#   docker build -t IMAGE --build-arg EXTRAS=cuda12,gcp .
#   docker run --rm IMAGE train --help
#
# Versions are those of tools/constraints.txt, which the tests ran with. tools/jobset.yaml runs it.
FROM python:3.11-slim
ARG EXTRAS=tpu,gcp
WORKDIR /src
COPY setup.py pyproject.toml LICENSE ./
COPY configs configs
COPY tools tools
COPY webssl_jax webssl_jax
RUN pip install --no-cache-dir --constraint tools/constraints.txt ".[$EXTRAS]"
# What environment.json of a run says it was made with; the image has no git.
ARG REVISION=unknown
ENV WEBSSL_REVISION=$REVISION
WORKDIR /
ENTRYPOINT ["webssl"]
