"""The main job at CPU scale: text, tokenizer, checkpoint, import, training, resume, export, proof."""
