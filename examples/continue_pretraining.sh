#!/usr/bin/env bash
# Continue the pretraining of a Hugging Face checkpoint on a blend of two texts, stop, go on under TP 2, and export.
#
#   bash examples/continue_pretraining.sh [OUT]      a minute or two on two CPU cores; STEPS=40 of 1024 tokens
#
# On a cluster: --hf-path tiiuae/Falcon-H1-0.5B-Base (or your directory) with falcon_h1_500m_pretrain_config, your data,
# and no overrides but a learning rate (optimizer.lr: a continued run takes a lower one) and a length. A checkpoint loads
# under any layout: fewer GPUs today, more tomorrow.
set -euo pipefail
out=${1:-out/continue_pretraining} steps=${STEPS:-40}
mkdir -p "$(dirname "$out")" && mkdir "$out"

# falcon-h1/ is a checkpoint as the Hub has them: config, safetensors, tokenizer
python "$(dirname "$0")/_tiny.py" "$out" text falcon-h1

for text in train held_out; do
    falcon-bridge data prepare "$out/$text.jsonl" --tokenizer "$out/falcon-h1" --out "$out/$text"
done

# four tokens of the one for each of the other, as when new text is mixed with what the model was trained on
continue_to() {
    falcon-bridge train --recipe falcon_h1_tiny_cpu_pretrain_config --hf-path "$out/falcon-h1" \
        --dataset "$out/train:0.8" --dataset "$out/held_out:0.2" "dataset.split='80,10,10'" \
        "train.train_iters=$1" "scheduler.lr_decay_iters=$steps" \
        "scheduler.lr_warmup_iters=$((steps / 10))" "scheduler.lr_wsd_decay_iters=$((steps / 5))" \
        "checkpoint.save=$out/run/checkpoints" "checkpoint.load=$out/run/checkpoints" "${@:2}"
}
continue_to "$((steps / 2))"
continue_to "$steps" model.tensor_model_parallel_size=2

falcon-bridge convert export "$out/run/checkpoints" "$out/hf"
