#!/usr/bin/env bash
# Fine-tune all weights on conversations: pack them, train on the answers alone, export, ask.
#
#   bash examples/sft.sh [OUT]      a minute or two on two CPU cores; STEPS=40 of four packed rows
#
# On a cluster: --hf-path tiiuae/Falcon-H1-0.5B-Base with falcon_h1_500m_sft_config (a recipe a size, 16k tokens a row,
# TII's schedule), your conversations packed with --seq-length 16384 and the chat template of an -Instruct tokenizer, and
# no overrides. docs/data.md has the forms of conversations, docs/finetuning.md the rest.
set -euo pipefail
out=${1:-out/sft} steps=${STEPS:-40}
mkdir -p "$(dirname "$out")" && mkdir "$out"

# chats.jsonl has a conversation a line, {"messages": [{"role": "user", "content": "…"}, …]}
python "$(dirname "$0")/_tiny.py" "$out" chats falcon-h1

falcon-bridge data prepare-chat "$out/chats.jsonl" --tokenizer "$out/falcon-h1" --out "$out/chats" \
    --seq-length 256 --validation-share 0.1

falcon-bridge train --recipe falcon_h1_tiny_cpu_sft_config --hf-path "$out/falcon-h1" --dataset "$out/chats" \
    "train.train_iters=$steps" "scheduler.lr_decay_iters=$steps" \
    "scheduler.lr_warmup_iters=$((steps / 10))" "scheduler.lr_wsd_decay_iters=$((steps / 5))" \
    "checkpoint.save=$out/run/checkpoints" "checkpoint.load=$out/run/checkpoints"

falcon-bridge convert export "$out/run/checkpoints" "$out/hf"
falcon-bridge generate "$out/hf" $'<bos>user\nWhat does Python\'s reference say about lambda?<eos>\n<bos>assistant\n' \
    --max-new-tokens 24
