#!/usr/bin/env bash
# Convert a checkpoint both ways, bit for bit, and prove against stock transformers that Megatron computes the same.
#
#   bash examples/convert_and_verify.sh [OUT]      about a minute on two CPU cores
#
# On a cluster: a hub id or your directory in the place of falcon-h1, and the layout that you will train with; verify
# starts its own ranks, over NCCL where there are GPUs. Every verb exits with 1 where something differs, so a script
# like this one is a check, and --json makes it one that another program reads.
set -euo pipefail
out=${1:-out/convert_and_verify}
mkdir -p "$(dirname "$out")" && mkdir "$out"

python "$(dirname "$0")/_tiny.py" "$out" falcon-h1

# a Megatron checkpoint has no layout of its own: it loads under any
falcon-bridge convert import "$out/falcon-h1" "$out/megatron"
falcon-bridge convert export "$out/megatron" "$out/hf" --tp 2
cmp "$out/falcon-h1/model.safetensors" "$out/hf/model.safetensors"

# logits, loss, all gradients and the weights after five optimizer steps, under tensor and sequence parallelism
falcon-bridge verify "$out/falcon-h1" --megatron "$out/megatron" --tp 2 --sequence-parallel --train-step

# and with documents packed into rows, over two pipeline stages; transformers sees each document alone
falcon-bridge verify "$out/falcon-h1" --pp 2 --packed
