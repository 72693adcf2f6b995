import pytest
import torch
from safetensors.torch import save_file

from falcon_bridge.verification.roundtrip import mismatched_tensors


@pytest.fixture
def source(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, {name: tensor.clone() for name, tensor in tensors.items()}


def test_equal_tensors_match_in_any_order(source):
    path, tensors = source
    assert mismatched_tensors(path, reversed(tensors.items())) == (3, [])


def test_one_bit_is_found(source):
    path, tensors = source
    tensors["a"].view(torch.int32)[2, 3] ^= 1
    assert mismatched_tensors(path, tensors.items()) == (3, ["a"])


def test_the_sign_of_a_zero_is_found(source):
    path, tensors = source
    tensors["c"][0] = -0.0
    assert mismatched_tensors(path, tensors.items()) == (3, ["c"])


def test_missing_unknown_and_repeated_names_are_found(source):
    path, tensors = source
    exported = [("a", tensors["a"]), ("a", tensors["a"]), ("d", tensors["a"]), ("c", tensors["c"])]
    assert mismatched_tensors(path, exported) == (5, ["a", "b", "d"])


def test_shape_counts(source):
    path, tensors = source
    tensors["a"] = tensors["a"].reshape(4, 3)
    assert mismatched_tensors(path, tensors.items()) == (3, ["a"])


def test_a_wider_model_keeps_a_narrow_source_and_a_narrow_model_rounds_it(source):
    path, tensors = source
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    assert mismatched_tensors(path, wide.items()) == (3, [])
    narrow = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert mismatched_tensors(path, narrow.items()) == (3, [])
    wide["b"] += 1e-2 * wide["b"].abs() + 1e-6
    assert mismatched_tensors(path, wide.items()) == (3, ["b"])
