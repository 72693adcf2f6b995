#!/usr/bin/env bash
# Fine-tune a prequantized Falcon-Edge on conversations, through its ternary weights, and export the packed codes.
#
#   bash examples/bitnet_finetune.sh [OUT]      a minute or two on two CPU cores; STEPS=40 of four packed rows
#
# A prequantized checkpoint holds the latent weights that the ternary ones are rounded from. On a cluster: that revision
# of a released model (tiiuae/Falcon-E-1B-Base, downloaded to a directory) with falcon_edge_1b_sft_config, your
# conversations packed with --seq-length 4096, and no overrides.
set -euo pipefail
out=${1:-out/bitnet_finetune} steps=${STEPS:-40}
mkdir -p "$(dirname "$out")" && mkdir "$out"

python "$(dirname "$0")/_tiny.py" "$out" chats falcon-edge
falcon-bridge data prepare-chat "$out/chats.jsonl" --tokenizer "$out/falcon-edge" --out "$out/chats" \
    --seq-length 256 --validation-share 0.1

falcon-bridge train --recipe falcon_edge_tiny_cpu_sft_config --hf-path "$out/falcon-edge" --dataset "$out/chats" \
    "train.train_iters=$steps" "scheduler.lr_decay_iters=$steps" \
    "scheduler.lr_warmup_iters=$((steps / 10))" "scheduler.lr_wsd_decay_iters=$((steps / 5))" \
    "checkpoint.save=$out/run/checkpoints" "checkpoint.load=$out/run/checkpoints"

falcon-bridge convert export "$out/run/checkpoints" "$out/bitnet" --format bitnet
falcon-bridge verify "$out/bitnet"
