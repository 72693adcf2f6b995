"""Real conversions over gloo ranks: exact, and with nothing left behind when they fail."""

import errno
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from falcon_bridge.conversion import exporter, importer, shards
from falcon_bridge.conversion.checksums import CHECKSUMS_NAME
from falcon_bridge.conversion.compare import compare_checkpoints
from falcon_bridge.conversion.exporter import export_checkpoint
from falcon_bridge.conversion.importer import import_checkpoint
from falcon_bridge.conversion.megatron_checkpoint import (
    HF_SOURCE_NAME,
    find_megatron_checkpoint,
    source_dtypes,
    source_files,
)
from falcon_bridge.conversion.roundtrip import round_trip
from falcon_bridge.conversion.safetensors_files import read_headers
from falcon_bridge.errors import JobError, UserError
from falcon_bridge.verification.checkpoints import write_random_checkpoint
from falcon_bridge.verification.layout import ParallelLayout


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("source") / "hf", "groups2_gated_norm", seed=2)


@pytest.fixture(scope="module")
def megatron(hf, tmp_path_factory):
    target = tmp_path_factory.mktemp("imported") / "megatron"
    import_checkpoint(hf, target, ParallelLayout())
    return target


def test_a_tied_bfloat16_checkpoint_comes_back_bit_for_bit_through_two_ranks(tmp_path):
    source = write_random_checkpoint(
        tmp_path / "hf", "tied_groups2_gated_norm", seed=3, dtype=torch.bfloat16, num_hidden_layers=2
    )
    stages = []
    found, _ = round_trip(
        source, ParallelLayout(tp=2, sequence_parallel=True), work_dir=tmp_path, progress=lambda *a: stages.append(a)
    )
    assert found.ok, found
    assert {stage for stage, _, _ in stages} == {"checking", "converting", "exporting"}
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_export_restores_all_files_with_checksums(hf, megatron, tmp_path):
    found = export_checkpoint(megatron, tmp_path / "back", ParallelLayout(pp=2), max_shard_bytes=100_000)
    assert found.config_from == "hf_source" and found.iteration == 0
    assert compare_checkpoints(hf, tmp_path / "back").ok
    written = {path.name for path in (tmp_path / "back").iterdir()}
    assert {path.name for path in hf.iterdir()} - {"model.safetensors"} < written
    assert (
        CHECKSUMS_NAME in written
        and len(list((tmp_path / "back").glob("model-*.safetensors"))) == found.nbytes // 100_000 + 1
    )
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (hf / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_export_without_a_source_builds_the_config(hf, megatron, tmp_path):
    from transformers import FalconH1Config

    scratch = shutil.copytree(megatron, tmp_path / "scratch")
    shutil.rmtree(scratch / HF_SOURCE_NAME)
    found = export_checkpoint(scratch, tmp_path / "back", ParallelLayout())
    assert found.config_from == "provider"
    compared = compare_checkpoints(hf, tmp_path / "back")
    assert not compared.mismatched
    before, after = (FalconH1Config.from_pretrained(path).to_dict() for path in (hf, tmp_path / "back"))
    before.pop("_name_or_path", None), after.pop("_name_or_path", None)
    # mamba_expand is unused where mamba_d_ssm is set
    assert {k for k in before if before[k] != after.get(k)} <= {"mamba_expand", "transformers_version", "use_cache"}


def test_export_refuses_a_config_of_another_model(megatron, tmp_path):
    other = shutil.copytree(megatron, tmp_path / "other")
    path = other / HF_SOURCE_NAME / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "embedding_multiplier": 3.25}))
    with pytest.raises(UserError, match=r"embedding_multiplier 3\.25, but the model was trained with 2\.2"):
        export_checkpoint(other, tmp_path / "back", ParallelLayout())
    assert not (tmp_path / "back").exists()


def test_damaged_megatron_checkpoints_are_named(megatron, tmp_path):
    broken = shutil.copytree(megatron, tmp_path / "broken")
    iteration = find_megatron_checkpoint(broken).iteration_dir
    (iteration / "run_config.yaml").rename(iteration / "kept.yaml")
    with pytest.raises(UserError, match=r"has no run_config\.yaml"):
        export_checkpoint(broken, tmp_path / "back", ParallelLayout())
    (iteration / "kept.yaml").rename(iteration / "run_config.yaml")
    shard = max(iteration.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data, metadata = shard.read_bytes(), (iteration / ".metadata").read_bytes()
    for path, content in (
        (shard, data[: len(data) // 3]),
        (iteration / ".metadata", metadata[: len(metadata) // 2]),
        (iteration / ".metadata", b"\x80\x05garbage"),
        (shard, None),
    ):
        shard.write_bytes(data)
        (iteration / ".metadata").write_bytes(metadata)
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged or incomplete .*: convert again") as caught:
            export_checkpoint(broken, tmp_path / "back", ParallelLayout())
        line = str(caught.value)
        assert len(line) < 500 and "Traceback" not in line and "frame #" not in line and "\n" not in line
    (broken / "latest_checkpointed_iteration.txt").write_text("²")
    with pytest.raises(UserError, match="instead of an iteration number"):
        export_checkpoint(broken, tmp_path / "back", ParallelLayout())
    (broken / "latest_checkpointed_iteration.txt").write_text("0")
    shutil.rmtree(iteration)
    with pytest.raises(UserError, match="which is not there"):
        export_checkpoint(broken, tmp_path / "back", ParallelLayout())
    assert not (tmp_path / "back").exists()


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def _full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("failure", "error", "text"), [(_interrupt, KeyboardInterrupt, ""), (_full, JobError, "no space")]
)
def test_a_failing_import_leaves_nothing(hf, tmp_path, monkeypatch, failure, error, text):
    # ranks are forked: what is patched here is patched there
    monkeypatch.setattr("megatron.bridge.AutoBridge.save_megatron_model", failure)
    with pytest.raises(error, match=text):
        import_checkpoint(hf, tmp_path / "made" / "megatron", ParallelLayout())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("failure", "error", "text"), [(_interrupt, KeyboardInterrupt, ""), (_full, JobError, "no space")]
)
def test_a_failing_export_leaves_nothing(megatron, tmp_path, monkeypatch, failure, error, text):
    written = []

    def fail_after_one_shard(tensors, path, **kwargs):
        if written:
            failure()
        written.append(path)
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr("safetensors.torch.save_file", fail_after_one_shard)
    with pytest.raises(error, match=text):
        export_checkpoint(megatron, tmp_path / "hf", ParallelLayout(), max_shard_bytes=20_000)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_export_is_not_left(megatron, tmp_path, monkeypatch):
    def lose_one(tensors, directory, **kwargs):
        return shards.write_shards((pair for pair in tensors if "final_layernorm" not in pair[0]), directory, **kwargs)

    monkeypatch.setattr(exporter, "write_shards", lose_one)
    with pytest.raises(JobError, match=r"not sound.*final_layernorm"):
        export_checkpoint(megatron, tmp_path / "hf", ParallelLayout())
    assert list(tmp_path.iterdir()) == []


def test_a_tied_head_that_is_stored_is_an_alias_or_refused(tmp_path):
    source = write_random_checkpoint(
        tmp_path / "hf", "tied_groups2_gated_norm", seed=3, dtype=torch.bfloat16, num_hidden_layers=1
    )
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    found, _ = round_trip(source, ParallelLayout())
    assert found.ok and found.params_compared == len(tensors) - 1, found
    tensors["lm_head.weight"][1, 2] += 1.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"stores a different lm_head\.weight"):
        import_checkpoint(source, tmp_path / "megatron", ParallelLayout())


def test_training_from_hugging_face_keeps_its_files(hf, tmp_path):
    from falcon_bridge.training.run import _keep_hf_source

    checkpoint = SimpleNamespace(pretrained_checkpoint=str(hf), save=str(tmp_path / "run" / "checkpoints"))
    for _ in range(2):  # a run that resumes has them already
        _keep_hf_source(SimpleNamespace(checkpoint=checkpoint))
    kept = tmp_path / "run" / "checkpoints" / HF_SOURCE_NAME
    assert [path.name for path in kept.parent.iterdir()] == [HF_SOURCE_NAME]
    names = {path.name for path in source_files(kept)}
    assert {"config.json", "tokenizer.json"} <= names and "model.safetensors" not in names
    assert source_dtypes(kept) == {name: info.dtype for name, info in read_headers(hf).items()}


def test_targets_that_hold_the_source_are_refused(hf, megatron):
    with pytest.raises(UserError, match="inside the source"):
        import_checkpoint(hf, hf / "megatron", ParallelLayout())
    with pytest.raises(UserError, match="inside the checkpoint"):
        export_checkpoint(megatron, megatron / HF_SOURCE_NAME / "hf", ParallelLayout())
    with pytest.raises(UserError, match="holds the source"):
        import_checkpoint(hf, hf.parent, ParallelLayout(), force=True)
    with pytest.raises(UserError, match="holds the checkpoint"):
        export_checkpoint(megatron, megatron, ParallelLayout(), force=True)
    assert (hf / "config.json").is_file() and (megatron / HF_SOURCE_NAME).is_dir()


def test_a_disk_that_is_too_small_is_seen_before_the_work(hf, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    monkeypatch.setattr(importer, "run_ranks", lambda *a, **k: pytest.fail("work began"))
    with pytest.raises(JobError, match=r"needs .* free"):
        import_checkpoint(hf, tmp_path / "megatron", ParallelLayout())
    assert list(tmp_path.iterdir()) == []
