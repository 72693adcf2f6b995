#!/usr/bin/env bash
# Pretrain a Falcon-H1 from scratch on text of your own: tokenize it, train, read the report, sample.
#
#   bash examples/pretrain.sh [OUT]      a minute or two on two CPU cores; STEPS=100 of 1024 tokens
#
# On a cluster: your files and your tokenizer (that of a released Falcon-H1), a recipe of your size
# (`falcon-bridge recipes`, such as falcon_h1_500m_pretrain_config) without the overrides below, which make a short run
# of a long schedule, and `falcon-bridge launch --executor slurm` in the place of `train` (docs/launching.md).
set -euo pipefail
out=${1:-out/pretrain} steps=${STEPS:-100}
mkdir -p "$(dirname "$out")" && mkdir "$out"

# train.jsonl has a document a line, {"text": "…"}; tokenizer/ is a Hugging Face one
python "$(dirname "$0")/_tiny.py" "$out" text tokenizer

# out/corpus.bin and .idx; bad rows are left out and listed
falcon-bridge data prepare "$out/train.jsonl" --tokenizer "$out/tokenizer" --out "$out/corpus"

# without tokenizer settings a recipe takes token ids as they are; with them the export has the tokenizer, too
falcon-bridge train --recipe falcon_h1_tiny_cpu_pretrain_config --dataset "$out/corpus" \
    tokenizer.tokenizer_type=HuggingFaceTokenizer "tokenizer.tokenizer_model=$out/tokenizer" tokenizer.vocab_size=null \
    "train.train_iters=$steps" "scheduler.lr_decay_iters=$steps" \
    "scheduler.lr_warmup_iters=$((steps / 10))" "scheduler.lr_wsd_decay_iters=$((steps / 5))" \
    "checkpoint.save=$out/run/checkpoints" "checkpoint.load=$out/run/checkpoints"

# the same `train` again would go on from there; report.md says with what, how fast, and how to export
sed -n 1,20p "$out/run/report.md"
falcon-bridge generate "$out/run/checkpoints" "The following" --tokenizer "$out/tokenizer" --max-new-tokens 24
