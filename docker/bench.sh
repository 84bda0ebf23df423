#!/bin/sh
# Measure this project's server, as docs/bench.md describes; with the first key of the secret, if any.
# It is in the environment of this process alone, whose user can read the secret anyway.
set -eu
keys=/run/secrets/api_keys
if [ -s "$keys" ]; then
    VLLM_API_KEY=$(awk '!/^#/ && NF > 1 { print $2; exit }' "$keys")
    export VLLM_API_KEY
fi
exec python -m bench run --url http://server:8000 "$@"
