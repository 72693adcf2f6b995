#!/usr/bin/env bash
# Pretrain a Falcon-Edge, whose linear layers are ternary (BitNet b1.58), and export it in three forms.
#
#   bash examples/bitnet_pretrain.sh [OUT]      a minute or two on two CPU cores; STEPS=80 of 1024 tokens
#
# On a cluster: falcon_edge_1b_pretrain_config or falcon_edge_1b_two_stage_pretrain_config without the overrides below.
# A Falcon-H1 becomes ternary with --use-bitnet in any of its recipes. docs/bitnet_training.md says what to watch.
set -euo pipefail
out=${1:-out/bitnet_pretrain} steps=${STEPS:-80}
mkdir -p "$(dirname "$out")" && mkdir "$out"

python "$(dirname "$0")/_tiny.py" "$out" text tokenizer
falcon-bridge data prepare "$out/train.jsonl" --tokenizer "$out/tokenizer" --out "$out/corpus"

falcon-bridge train --recipe falcon_edge_tiny_cpu_pretrain_config --dataset "$out/corpus" \
    tokenizer.tokenizer_type=HuggingFaceTokenizer "tokenizer.tokenizer_model=$out/tokenizer" tokenizer.vocab_size=null \
    "train.train_iters=$steps" "scheduler.lr_decay_iters=$steps" \
    "scheduler.lr_warmup_iters=$((steps / 10))" "scheduler.lr_wsd_decay_iters=$((steps / 5))" \
    "checkpoint.save=$out/run/checkpoints" "checkpoint.load=$out/run/checkpoints"

# packed codes to run, latent weights to train on (examples/bitnet_finetune.sh), bf16 for what knows no BitNet
for form in bitnet prequantized bf16; do
    falcon-bridge convert export "$out/run/checkpoints" "$out/$form" --format "$form"
done
du -h "$out"/{bitnet,prequantized,bf16}/model.safetensors
