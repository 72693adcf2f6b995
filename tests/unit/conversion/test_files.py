import json

import pytest
import torch
from safetensors import safe_open

from falcon_bridge.conversion.checksums import CHECKSUMS_NAME, verify_checksums, write_checksums
from falcon_bridge.conversion.compare import compare_checkpoints
from falcon_bridge.conversion.safetensors_files import check_values, read_headers
from falcon_bridge.conversion.shards import write_shards
from falcon_bridge.errors import JobError, UserError


def _tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(3, 5 + i, generator=generator).to(dtype) for i in range(4)}


def _write(path, tensors, **kwargs):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"a": 1, "b": [1.5]}))
    return write_shards(tensors.items(), path, **kwargs)


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (1, 4), (150, 3)])
def test_shards_read_back(tmp_path, limit, files):
    tensors = _tensors()
    # a view of a larger storage, and not contiguous
    tensors["t3"] = torch.randn(8, 16)[:, ::2][:5].T
    sizes = _write(tmp_path / "hf", tensors, max_shard_bytes=limit)
    assert sizes == {name: t.numel() * 4 for name, t in tensors.items()}
    headers = read_headers(tmp_path / "hf")
    assert len({info.file for info in headers.values()}) == files
    assert not list((tmp_path / "hf").glob("*.partial"))
    for name, tensor in tensors.items():
        with safe_open(headers[name].file, "pt") as file:
            assert torch.equal(file.get_tensor(name), tensor) and file.metadata() == {"format": "pt"}
        assert headers[name].shape == tuple(tensor.shape) and headers[name].dtype == "F32"
        assert headers[name].nbytes == sizes[name]


def test_a_name_twice_is_refused(tmp_path):
    with pytest.raises(JobError, match="twice"):
        write_shards([("a", torch.ones(2)), ("a", torch.ones(2))], tmp_path)


def test_the_same_tensor_in_two_files_is_refused(tmp_path):
    _write(tmp_path / "hf", _tensors())
    (tmp_path / "hf" / "other.safetensors").write_bytes((tmp_path / "hf" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="t0 twice"):
        read_headers(tmp_path / "hf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2e8, None])
def test_values(tmp_path, dtype, value):
    tensors = _tensors(dtype)
    if value is not None:
        tensors["t2"][1, 3] = value
    _write(tmp_path / "hf", tensors)
    seen, headers = [], read_headers(tmp_path / "hf")
    if value is None:
        check_values(headers, allow_nonfinite=False, progress=seen.append)
        assert sorted(seen) == sorted(tensors)
        return
    with pytest.raises(UserError, match="t2 has"):
        check_values(headers, allow_nonfinite=False)
    check_values(headers, allow_nonfinite=True)


def test_checksums_see_every_bit(tmp_path):
    hf = tmp_path / "hf"
    _write(hf, _tensors(), max_shard_bytes=150)
    assert not verify_checksums(hf)
    write_checksums(hf)
    seen = []
    assert verify_checksums(hf, seen.append) and len(seen) == 3
    path = hf / seen[1]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{seen[1]} differs from its SHA-256"):
        verify_checksums(hf)
    path.unlink()
    with pytest.raises(UserError, match="not in"):
        verify_checksums(hf)
    (hf / CHECKSUMS_NAME).write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        verify_checksums(hf)


def test_comparison_is_bitwise(tmp_path):
    tensors = _tensors()
    tensors["t0"][0, 0] = 0.0
    _write(tmp_path / "a", tensors)
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    _write(tmp_path / "same", changed, max_shard_bytes=1)
    assert compare_checkpoints(tmp_path / "a", tmp_path / "same").ok
    changed["t0"][0, 0] = -0.0  # equal as a number, not as bits
    changed["t1"] = changed["t1"].double()
    changed["new"] = changed.pop("t3")
    _write(tmp_path / "b", changed)
    (tmp_path / "b" / "config.json").write_text(json.dumps({"a": 1.0, "b": [1.5], "c": None}))
    found = compare_checkpoints(tmp_path / "a", tmp_path / "b")
    assert not found.ok and found.params_compared == 5
    assert sorted(found.mismatched) == ["new", "t0", "t1", "t3"]
    assert found.config_differences == {"c": (None, None)}
