#!/bin/sh
# Name the folders of all compile caches and the file of the API keys, become the command.
# What is executed in a running container goes through this, too: it would look elsewhere.
set -eu

# Compiled code of another pin or series is never looked at: each has a folder of its own.
caches=/caches/$(sha256sum /opt/dsv4-maxq/patches/vllm.lock | cut -c 1-12)
if ! mkdir -p "$caches" /caches/reports 2>/dev/null; then
    echo "entrypoint: /caches cannot be written by user $(id -u); mount a volume that it owns" >&2
    exit 2
fi
# What none of these names lands in HOME.
export HOME="$caches/home" XDG_CACHE_HOME="$caches"
export VLLM_CACHE_ROOT="$caches/vllm" TORCHINDUCTOR_CACHE_DIR="$caches/inductor"
export TRITON_CACHE_DIR="$caches/triton" TILELANG_CACHE_DIR="$caches/tilelang"
export FLASHINFER_WORKSPACE_BASE="$caches/flashinfer" DG_JIT_CACHE_DIR="$caches/deep_gemm"
export CUDA_CACHE_PATH="$caches/cuda" TORCH_EXTENSIONS_DIR="$caches/torch_extensions"
mkdir -p "$HOME"

# An empty file stands for no keys; any other is read, or refused, by `serve`. A folder, which
# docker-compose 1.29 makes where nothing is, may have no size, either.
keys=/run/secrets/api_keys
if [ -e "$keys" ] && [ ! -f "$keys" ]; then
    echo "entrypoint: $keys is no file; SERVE_API_KEY_FILE must name a file of the host" >&2
    exit 2
fi
if [ -s "$keys" ]; then
    export SERVE_API_KEY_FILE="$keys"
fi
exec "$@"
