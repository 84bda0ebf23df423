#!/bin/sh
# Build step: this project, from where it lies; the user; the folders of its volumes.
set -eu
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
pip install --no-deps --no-index --no-build-isolation --quiet --editable .
python -m compileall -q bench kernels retrofit serve tiny
python patches/patchq.py verify --root "$site"
groupadd --gid 2000 dsv4
useradd --uid 2000 --gid 2000 --no-create-home --home-dir /caches/home --shell /bin/sh dsv4
install -d -o dsv4 -g dsv4 /caches results
