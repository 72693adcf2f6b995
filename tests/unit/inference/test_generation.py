"""The Megatron model's text against ``transformers``' own ``generate``."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from falcon_bridge.conversion.importer import import_checkpoint
from falcon_bridge.errors import UserError
from falcon_bridge.inference.sampling import Sampling
from falcon_bridge.inference.text import GenerationRequest, generate_text
from falcon_bridge.verification.checkpoints import write_random_checkpoint
from falcon_bridge.verification.layout import ParallelLayout


PROMPT = "w17 w3 w99 w45 w8"
NEW = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    # with this seed the greedy text wanders, and does not meet the eos token
    return write_random_checkpoint(
        tmp_path_factory.mktemp("hf") / "model", "groups2_gated_norm", seed=3, lm_head_multiplier=3.0
    )


@pytest.fixture(scope="module")
def expected(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    inputs = AutoTokenizer.from_pretrained(checkpoint)(PROMPT, return_tensors="pt")
    tokens = model.generate(
        **{k: inputs[k] for k in ("input_ids", "attention_mask")},
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        use_cache=False,
    )
    return tokens[0, inputs.input_ids.shape[1] :].tolist()


@pytest.mark.parametrize("tp", [1, 2])
def test_greedy_equals_transformers_token_by_token(tp, checkpoint, expected):
    seen = []
    generation = generate_text(GenerationRequest(checkpoint, PROMPT, NEW, tp=tp), on_token=seen.append)
    assert len(set(expected)) > 4
    assert generation.tokens == expected
    assert generation.prompt_tokens == [17, 3, 99, 45, 8]
    assert generation.finish_reason == "length"
    assert generation.text.split() == [f"w{token}" for token in expected]
    assert seen == expected


def test_stops_at_eos(checkpoint, expected, tmp_path):
    changed = tmp_path / "model"
    shutil.copytree(checkpoint, changed)
    eos = next(token for i, token in enumerate(expected) if i > 2 and token not in expected[:i])
    config = changed / "config.json"
    config.write_text(config.read_text().replace('"eos_token_id": 11', f'"eos_token_id": [11, {eos}]'))
    generation = generate_text(GenerationRequest(changed, PROMPT, NEW))
    assert generation.tokens == expected[: expected.index(eos) + 1]
    assert generation.finish_reason == "eos"


def test_a_megatron_checkpoint_gives_the_same(checkpoint, expected, tmp_path):
    import_checkpoint(checkpoint, tmp_path / "megatron", ParallelLayout())
    generation = generate_text(GenerationRequest(tmp_path / "megatron", PROMPT, NEW, tp=2))
    assert generation.tokens == expected


def test_sampling_is_repeatable_and_differs_by_seed(checkpoint, expected):
    def sample(seed, tp=1):
        sampling = Sampling(temperature=1.5, top_k=50, top_p=0.99, seed=seed)
        return generate_text(GenerationRequest(checkpoint, PROMPT, NEW, sampling, tp)).tokens

    first = sample(1)
    assert first == sample(1, tp=2)
    assert first != sample(2)
    assert first != expected


def test_what_cannot_be_used_is_refused(checkpoint, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=lambda _, names: [n for n in names if n.startswith("tokenizer")])
    cases = {
        "--tokenizer": GenerationRequest(bare, PROMPT),
        "no token": GenerationRequest(checkpoint, ""),
        "--max-new-tokens": GenerationRequest(checkpoint, PROMPT, 0),
        "--tp 3": GenerationRequest(checkpoint, PROMPT, tp=3),
        "does not exist": GenerationRequest(tmp_path / "nowhere", PROMPT),
    }
    for says, request in cases.items():
        with pytest.raises(UserError, match=says):
            generate_text(request)
    assert generate_text(GenerationRequest(bare, PROMPT, 1, tokenizer=checkpoint)).tokens
