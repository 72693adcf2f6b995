"""LoRA (or DoRA) on a Falcon-H1 through the Python API: train adapters, export them, load them in stock PEFT.

    python examples/lora.py --out out/lora      a minute or two on two CPU cores; --steps 40 of four packed rows

On a cluster: `falcon-bridge train --recipe falcon_h1_7b_peft_config --hf-path … --dataset …` trains, with your
conversations packed to 16384 tokens; the two exports below are the same.
"""

import argparse
from pathlib import Path

import _tiny
import torch


def train(out: Path, scheme: str, steps: int) -> list[float]:
    """Pack the chats and train adapters on them.

    Returns:
        The loss of each step.
    """
    from falcon_bridge.data.prepare_chat import prepare_chat
    from falcon_bridge.training.run import configure, run_pretrain

    prepare_chat([out / "chats.jsonl"], out / "falcon-h1", out / "chats", seq_length=256, validation_share=0.1)
    cfg = configure(
        "falcon_h1_tiny_cpu_peft_config",
        # what the command line takes, too; the base has random weights here, and takes larger steps than a trained one
        [
            f"train.train_iters={steps}",
            f"scheduler.lr_decay_iters={steps}",
            f"scheduler.lr_warmup_iters={steps // 10}",
            f"scheduler.lr_wsd_decay_iters={steps // 5}",
            "peft.dim=16",
            f"checkpoint.save={out / 'run'}",
            f"checkpoint.load={out / 'run'}",
        ],
        dataset=out / "chats",
        hf_path=str(out / "falcon-h1"),
        peft_scheme=scheme,
    )
    losses: list[float] = []
    run_pretrain(cfg, 1, on_event=lambda rank, event: losses.append(event.loss) if hasattr(event, "lr") else None)
    return losses


def export(out: Path) -> float:
    """Export adapters and merged weights.

    Returns:
        The largest difference between logits of stock PEFT with the adapters and of the merged model.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from falcon_bridge.conversion.adapter_export import export_adapter
    from falcon_bridge.conversion.adapter_merge import export_merged
    from falcon_bridge.verification.layout import ParallelLayout

    export_adapter(out / "run", out / "adapter")
    export_merged(out / "run", out / "merged", ParallelLayout())
    base = AutoModelForCausalLM.from_pretrained(out / "falcon-h1", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, out / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(out / "merged")("The lambda expression", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        outputs = [model(input_ids=tokens, use_cache=False).logits for model in (adapted, merged)]
    return (outputs[0] - outputs[1]).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--scheme", default="lora", choices=("lora", "dora"))
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True)
    _tiny.write(out, "chats", "falcon-h1")
    losses = train(out, arguments.scheme, arguments.steps)
    difference = export(out)
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {len(losses)} steps; adapters in {out / 'adapter'}")
    print(f"stock PEFT and the merged model differ by {difference:.1e} at most")
    if difference > 1e-4:
        raise SystemExit("they should be the same")


if __name__ == "__main__":
    main()
