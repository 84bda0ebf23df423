#!/bin/sh
# Build step: the one vLLM wheel that patches/vllm.lock names, its hash checked, patched, verified.
# It lies alone in /opt/engine, and is laid over the dependencies that another stage installed.
set -eu
package=$1
queue=/src/patches
python -m venv --without-pip /opt/engine
site=$(/opt/engine/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
wheels=$(mktemp -d)
python "$queue/patchq.py" fetch-wheel --package "$package" --dest "$wheels"
python -m pip --python /opt/engine/bin/python install --no-deps --no-index "$wheels"/*.whl
rm -r "$wheels"
python "$queue/patchq.py" apply --root "$site"
python "$queue/patchq.py" verify --root "$site"
# The image is read-only: what the patches changed would be compiled at every start.
python -m compileall -q "$site/vllm"
