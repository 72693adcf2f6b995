"""Data and recipe together: what fits is set up whole, what does not is refused before any work."""

import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from falcon_bridge import recipes
from falcon_bridge.data.info import sft_info, text_info
from falcon_bridge.data.prepare import prepare_text
from falcon_bridge.data.prepare_chat import prepare_chat
from falcon_bridge.errors import UserError
from falcon_bridge.training import vocabulary
from falcon_bridge.training.dataset import check_dataset, use_dataset, use_sft_dataset
from falcon_bridge.training.documents import separate_documents
from falcon_bridge.training.recipe import apply_overrides, load_recipe
from tests.unit.data.chats import conversations
from tests.unit.data.conftest import tokenizers  # noqa: F401  a fixture


def pretrain(*overrides):
    cfg = load_recipe("falcon_h1_tiny_cpu_pretrain_config")
    return apply_overrides(cfg, overrides)


def write(prefix, documents, dtype=np.uint16):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for tokens in documents:
        builder.add_document(np.array(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def text(tmp_path):
    """An indexed dataset by Megatron's builder alone, as other tools make it."""
    generator = np.random.default_rng(0)
    return write(tmp_path / "text", [generator.integers(1021, size=50) for _ in range(40)])


@pytest.fixture(scope="module")
def prepared(tokenizers, tmp_path_factory):  # noqa: F811
    """Text and chats as the verbs make them."""
    base = tmp_path_factory.mktemp("prepared")
    rows = conversations(80)
    (base / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [message["content"] for row in rows for message in row["messages"]]
    (base / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    prepare_text([base / "text.jsonl"], tokenizers / "plain", base / "text")
    chat = {"seq_length": 512, "pad_multiple": 4, "validation_share": 0.4}
    prepare_chat([base / "chat.jsonl"], tokenizers / "marked", base / "chat", **chat)
    prepare_chat([base / "chat.jsonl"], tokenizers / "marked", base / "whole", seq_length=512)
    return base


def sft(path, *overrides):
    cfg = load_recipe("falcon_h1_90m_sft_config")
    use_dataset(cfg, path)
    batch = ["train.global_batch_size=4", "validation.eval_iters=1"]
    apply_overrides(cfg, [*batch, *overrides])
    return cfg


def test_one_dataset_by_any_of_its_names(text):
    for name in (text, f"{text}.bin", Path(f"{text}.idx"), [str(text)]):
        cfg = pretrain()
        use_dataset(cfg, name)
        check_dataset(cfg)
        assert cfg.dataset.blend == [[str(text)], None]


def test_blends(text, tmp_path):
    other = write(tmp_path / "a:2", [[1, 2, 3]] * 40)
    cfg = pretrain()
    use_dataset(cfg, [f"{text}:0.7", f"{other}:.3"])
    check_dataset(cfg)
    assert cfg.dataset.blend == [[str(text), str(other)], [0.7, 0.3]]
    use_dataset(cfg, [text, other])
    by_size = [[str(text), str(other)], [2000.0, 120.0]]
    assert cfg.dataset.blend == by_size
    cfg = pretrain(f"dataset.blend=[[{text},'{other}'],null]")
    check_dataset(cfg)
    assert cfg.dataset.blend == by_size
    use_dataset(cfg, f"{text}:2")
    assert cfg.dataset.blend == [[str(text)], None]
    with pytest.raises(UserError, match=r"text has no weight and others have one"):
        use_dataset(cfg, [text, f"{other}:0.3"])
    for weight in ("0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match="must be above 0"):
            use_dataset(cfg, [f"{text}:{weight}"])


def test_missing_files_by_name_and_by_override(text):
    with pytest.raises(UserError, match=r"none\.bin does not exist"):
        use_dataset(pretrain(), text.parent / "none")
    Path(f"{text}.idx").rename(text.parent / "kept")
    for override in (
        f"dataset.blend=[[{text}],null]",
        f"dataset.data_path={text}",
        f"dataset.blend_per_split=[[[{text}],null],null,null]",
    ):
        with pytest.raises(UserError, match=r"text\.idx does not exist"):
            check_dataset(pretrain(override))


def test_damaged_files(text):
    data = Path(f"{text}.bin").read_bytes()
    Path(f"{text}.bin").write_bytes(data[:-2])
    with pytest.raises(UserError, match=r"text\.bin has 3998 bytes and its index describes 4000"):
        check_dataset(pretrain(f"dataset.blend=[[{text}],null]"))
    Path(f"{text}.idx").write_bytes(b"MMIDIDX")
    with pytest.raises(UserError, match=r"text\.idx is not the index"):
        check_dataset(pretrain(f"dataset.blend=[[{text}],null]"))


def test_empty_datasets_and_splits(text, tmp_path):
    write(tmp_path / "empty", [])
    with pytest.raises(UserError, match="empty is empty: it has 0 documents"):
        check_dataset(pretrain(f"dataset.blend=[[{text},{tmp_path / 'empty'}],null]"))
    small = write(tmp_path / "small", [[1, 2, 3]] * 4)
    # Megatron builds all splits, also where nothing is evaluated
    for overrides in ((), ("validation.eval_iters=0",)):
        with pytest.raises(
            UserError, match=r"has 4 documents, of which dataset\.split=90,5,5 gives none to validation"
        ):
            check_dataset(pretrain(f"dataset.blend=[[{small}],null]", *overrides))
    check_dataset(pretrain(f"dataset.blend=[[{small}],null]", "dataset.split='100,0,0'", "validation.eval_iters=0"))
    check_dataset(pretrain(f"dataset.blend=[[{small}],null]", "dataset.split='50,25,25'"))


def test_tokens_that_the_model_does_not_have(text, tmp_path, monkeypatch):
    use = f"dataset.blend=[[{text}],null]"
    check_dataset(pretrain(use))
    with pytest.raises(UserError, match=r"has the token 10\d\d and the model's vocabulary ends at 999"):
        check_dataset(pretrain(use, "model.vocab_size=1000"))
    # a large file is sampled: both ends and between
    monkeypatch.setattr(vocabulary, "_WHOLE_TOKENS", 1280)
    for place in (0, 19_999, 10_000):
        tokens = np.ones(20_000, dtype=np.int64)
        tokens[max(0, place - 200) : place + 200] = 60_000
        large = write(tmp_path / "large", [tokens.tolist()] * 1)
        assert vocabulary.largest_token(str(large), np.uint16) == 60_000


def test_rows_longer_than_the_context():
    cfg = load_recipe("falcon_h1_500m_pretrain_config")
    apply_overrides(cfg, ["dataset.seq_length=32768"])
    with pytest.raises(UserError, match="32768 is longer than the model's context of 16384 tokens"):
        check_dataset(cfg)
    check_dataset(apply_overrides(cfg, ["model.max_position_embeddings=32768"]))


def test_what_is_known_of_prepared_text(prepared, tokenizers, tmp_path):  # noqa: F811
    cfg = pretrain("validation.eval_iters=0")
    use_dataset(cfg, prepared / "text")
    check_dataset(cfg)
    info = text_info(prepared / "text")
    with pytest.raises(UserError, match=f"has the token {info.max_token_id} and"):
        check_dataset(apply_overrides(cfg, [f"model.vocab_size={info.max_token_id}"]))
    apply_overrides(cfg, ["model.vocab_size=1021", "tokenizer.tokenizer_type=HuggingFaceTokenizer"])
    cfg.tokenizer.tokenizer_model = str(tokenizers / "marked")  # saved again, the same vocabulary
    check_dataset(cfg)
    other = json.loads((tokenizers / "plain" / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    for file in (tokenizers / "plain").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    cfg.tokenizer.tokenizer_model = str(tmp_path)
    with pytest.raises(UserError, match=r"text was made with another tokenizer \(.*plain\)"):
        check_dataset(cfg)


def test_a_recipe_set_to_packed_chats(prepared, tokenizers):  # noqa: F811
    cfg = sft(prepared / "chat")
    check_dataset(cfg)
    specs = cfg.dataset.offline_packing_specs
    assert specs.packed_train_data_path == str(prepared / "chat" / "training.idx.parquet")
    assert specs.packed_val_data_path == str(prepared / "chat" / "validation.idx.parquet")
    assert (specs.packed_sequence_size, specs.pad_seq_to_mult) == (512, 4)
    assert cfg.model.seq_length == cfg.dataset.seq_length == 512
    assert cfg.train.micro_batch_size == 1 and cfg.validation.eval_iters == 1
    assert cfg.tokenizer.tokenizer_model == str(prepared / "chat" / "tokenizer")
    assert sft_info(prepared / "chat").vocab_size == 600

    cfg = sft(prepared / "whole", "train.micro_batch_size=2")
    check_dataset(cfg)
    assert cfg.validation.eval_iters == 0 and not cfg.dataset.do_validation
    assert cfg.train.micro_batch_size == 1

    use_sft_dataset(cfg, prepared / "chat", tokenizer=tokenizers / "marked")
    assert cfg.tokenizer.tokenizer_model == str(tokenizers / "marked")


def test_layouts_and_packed_chats(prepared):
    cp = "model.context_parallel_size=2"
    cfg = sft(prepared / "chat", cp)
    check_dataset(cfg)
    assert cfg.model.calculate_per_token_loss and not cfg.ddp.average_in_collective
    with pytest.raises(UserError, match="multiples of 8: pack again with `data prepare-chat --tp 1 --cp 4`"):
        check_dataset(sft(prepared / "chat", "model.context_parallel_size=4"))
    with pytest.raises(UserError, match="is packed to multiples of 1, and TP 1 with CP 2 needs multiples of 4"):
        check_dataset(sft(prepared / "whole", cp))
    # ranks of sequence parallelism share the row, whatever stands in it
    check_dataset(sft(prepared / "whole", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["dataset.seq_length=1024"], "is packed to rows of 512 tokens, not dataset.seq_length=1024"),
        (["model.vocab_size=300"], "has the token .* and the model's vocabulary ends at 299"),
        (["train.global_batch_size=400"], "rows, fewer than a batch of 400: lower train.global_batch_size"),
    ],
)
def test_packed_chats_that_do_not_fit(overrides, problem, prepared):
    with pytest.raises(UserError, match=problem):
        check_dataset(sft(prepared / "chat", *overrides))


def test_damaged_packed_chats(prepared, tmp_path):
    import shutil

    copy = shutil.copytree(prepared / "chat", tmp_path / "copy")
    cfg = sft(copy)
    (copy / "training.idx.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"training\.idx\.parquet is not a Parquet file"):
        check_dataset(cfg)
    (copy / "training.idx.parquet").unlink()
    with pytest.raises(UserError, match=r"training\.idx\.parquet does not exist"):
        check_dataset(cfg)
    (copy / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="is not a packed chat dataset"):
        use_sft_dataset(cfg, copy)


def test_data_of_the_other_kind(prepared, text):
    with pytest.raises(UserError, match="is packed chat data and this recipe pretrains"):
        use_dataset(pretrain(), prepared / "chat")
    with pytest.raises(UserError, match="this recipe fine-tunes on packed chat data"):
        sft(text)
    with pytest.raises(UserError, match="does not blend"):
        sft([prepared / "chat", prepared / "whole"])


def test_documents_apart_follow_the_layout(text):
    cfg = pretrain(f"dataset.blend=[[{text}],null]", "model.num_layers=4")
    separate_documents(cfg)
    check_dataset(cfg)
    assert cfg.dataset.skip_getting_attention_mask_from_dataset and not cfg.dataset.create_attention_mask
    apply_overrides(cfg, ["model.pipeline_model_parallel_size=4", "train.micro_batch_size=1"])
    check_dataset(cfg)
    assert not cfg.dataset.skip_getting_attention_mask_from_dataset
    with pytest.raises(UserError, match=r"in a pipeline one row at a time, and train\.micro_batch_size=2"):
        check_dataset(apply_overrides(cfg, ["train.micro_batch_size=2"]))
    apply_overrides(cfg, ["model.pipeline_model_parallel_size=1", "model.context_parallel_size=2"])
    with pytest.raises(UserError, match=r"otherwise each would be cut .*: set model\.cp_comm_type=a2a, or"):
        check_dataset(cfg)
    check_dataset(apply_overrides(cfg, ["model.cp_comm_type=a2a"]))
    cfg.model.cp_comm_type = None
    check_dataset(apply_overrides(cfg, ["dataset.inter_document_masking=false"]))


def test_recipes_keep_documents_apart():
    for name in recipes.RECIPES:
        cfg = load_recipe(name)
        if hasattr(cfg.dataset, "inter_document_masking"):
            assert cfg.dataset.inter_document_masking, name
            check_dataset(cfg)
