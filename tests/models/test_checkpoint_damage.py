"""Every kind of damage to a checkpoint is found, and told by tensor and file in one error."""

import hashlib
import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from atomc.errors import CheckpointError
from atomc.models.deepseek_v4.checkpoint import CheckpointReader, expected_tensors, validate, write_checkpoint
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.shards import INDEX_NAME
from tests.support.tiny import random_tensors, tiny_config

E8M0, FP8 = torch.float8_e8m0fnu, torch.float8_e4m3fn


def faults(folder: Path, config: DeepseekV4Config | None = None, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        validate(CheckpointReader(folder), config or tiny_config(), **options)
    assert caught.value.exit_code == 4
    return caught.value


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None], holding: str) -> str:
    """Change the tensors of the shard that holds `holding`; the index stays. Returns the file name."""
    file = json.loads((folder / INDEX_NAME).read_text())["weight_map"][holding]
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(folder / file).items()}
    change(tensors)
    safetensors.torch.save_file(tensors, folder / file)
    return str(file)


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


WQ, SINK, EXPERT = "layers.1.attn.wq_a.weight", "layers.1.attn.attn_sink", "layers.4.ffn.experts.7.w2.weight"


@pytest.mark.parametrize("name", [WQ, WQ.replace("weight", "scale"), SINK, EXPERT, "layers.0.ffn.gate.tid2eid"])
def test_a_missing_tensor(copy: Path, name: str) -> None:
    rewrite(copy, lambda tensors: tensors.__delitem__(name), name)
    edit_index(copy, lambda weight_map: weight_map.__delitem__(name))
    assert faults(copy).problems == (f"{name}: is missing",)
    with pytest.raises(CheckpointError, match="is missing"):
        CheckpointReader(copy).load(name)


def test_an_extra_tensor(copy: Path) -> None:
    file = rewrite(copy, lambda tensors: tensors.update({"layers.9.odd": torch.ones(1)}), WQ)
    edit_index(copy, lambda weight_map: weight_map.update({"layers.9.odd": file}))
    assert faults(copy).problems == (f"layers.9.odd ({file}): is not a tensor of this model",)


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        (WQ, torch.zeros(40, 65).to(FP8), "has shape [40, 65], expected [40, 64]"),
        (WQ, torch.zeros(64, 40).to(FP8), "has shape [64, 40], expected [40, 64]"),
        (WQ, torch.zeros(40, 64), "has dtype float32, expected float8_e4m3fn"),
        (WQ, torch.zeros(40, 64, dtype=torch.int8), "has dtype int8, expected float8_e4m3fn"),
        (WQ.replace("weight", "scale"), torch.ones(2, 1).to(E8M0), "has shape [2, 1], expected [1, 1]"),
        (
            WQ.replace("weight", "scale"),
            torch.ones(1, 1, dtype=torch.uint8),
            "has dtype uint8, expected float8_e8m0fnu or float32",
        ),
        (EXPERT, torch.zeros(64, 32, dtype=torch.int8), "has shape [64, 32], expected [64, 16]"),
        (EXPERT.replace("weight", "scale"), torch.ones(64, 1), "has dtype float32, expected float8_e8m0fnu"),
        (SINK, torch.zeros(8, dtype=torch.float16), "has dtype float16, expected float32 or bfloat16"),
        (SINK, torch.zeros(8, 1), "has shape [8, 1], expected [8]"),
        ("embed.weight", torch.zeros(160, 64, dtype=torch.float16), "expected bfloat16 or float32"),
        ("layers.0.ffn.gate.tid2eid", torch.zeros(160, 3), "has dtype float32, expected int64 or int32"),
    ],
)
def test_a_wrong_shape_or_dtype(copy: Path, name: str, tensor: Tensor, problem: str) -> None:
    file = rewrite(copy, lambda tensors: tensors.update({name: tensor}), name)
    (found,) = faults(copy, values=False).problems
    assert found.startswith(f"{name} ({file}): ")
    assert problem in found


def test_scales_that_are_nan(copy: Path) -> None:
    name = EXPERT.replace("weight", "scale")

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(torch.uint8)[3, 0] = 0xFF

    file = rewrite(copy, spoil, name)
    expected = f"{name} ({file}): 1 of 64 scales are NaN (E8M0 byte 0xFF)"
    assert faults(copy).problems == (expected,)
    validate(CheckpointReader(copy), tiny_config(), values=False)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_float_scales_that_are_not_positive_numbers(copy: Path, bad: float) -> None:
    name = WQ.replace("weight", "scale")
    rewrite(copy, lambda tensors: tensors.update({name: torch.tensor([[bad]])}), name)
    (problem,) = faults(copy).problems
    assert name in problem
    assert "not positive" in problem or "NaN or infinite" in problem


@pytest.mark.parametrize("entry", [-1, 12])
def test_hash_tables_that_name_no_expert(copy: Path, entry: int) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    rewrite(copy, lambda tensors: tensors[name].__setitem__((5, 1), entry), name)
    assert "1 entries are no expert index, 0 .. 11" in str(faults(copy))


@pytest.mark.parametrize(("name", "bad"), [(SINK, float("nan")), ("embed.weight", float("inf")), (WQ, float("nan"))])
def test_weights_that_are_not_finite(copy: Path, name: str, bad: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        values = tensors[name].float()
        values.view(-1)[0] = bad
        tensors[name] = values.to(tensors[name].dtype)

    rewrite(copy, spoil, name)
    validate(CheckpointReader(copy), tiny_config())
    assert f"1 of {prod(expected_tensors(tiny_config())[name].shape)} values are NaN" in str(faults(copy, finite=True))


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_a_truncated_shard(copy: Path, keep: int) -> None:
    file = sorted(copy.glob("*.safetensors"))[1]
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    error = faults(copy)
    assert len(error.problems) == 1, "tensors of a broken shard are not missing on their own"
    assert error.problems[0].startswith(f"{file.name}: is truncated")


def test_a_shard_with_something_behind_it(copy: Path) -> None:
    file = sorted(copy.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes() + b"x")
    assert f"{file.name}: is too long" in str(faults(copy))


def header_edit(file: Path, change: Callable[[dict[str, Any]], None] | None, text: bytes | None = None) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if text is None:
        assert change is not None
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "text", "problem"),
    [
        (lambda h: h[WQ].update(dtype="F4"), None, "bad header entry for " + WQ),
        (lambda h: h[WQ].update(shape=[40, 63]), None, "does not fill bytes"),
        (lambda h: h[WQ].update(shape=[40.0, 64]), None, "non-negative integers"),
        (lambda h: h[WQ].update(shape=[-40, -64]), None, "non-negative integers"),
        (lambda h: h[WQ].pop("data_offsets"), None, "bad header entry for " + WQ),
        (lambda h: h.update({WQ: 3}), None, "bad header entry for " + WQ),
        (lambda h: h[WQ].update(data_offsets=[n + 1 for n in h[WQ]["data_offsets"]]), None, "start at byte"),
        (None, b"{not json", "not JSON"),
        (None, b"[1, 2]", "not an object"),
        (None, b"\xff\xfe", "not JSON"),
    ],
)
def test_a_damaged_header(
    copy: Path, change: Callable[[dict[str, Any]], None] | None, text: bytes | None, problem: str
) -> None:
    file = copy / json.loads((copy / INDEX_NAME).read_text())["weight_map"][WQ]
    header_edit(file, change, text)
    (found,) = faults(copy).problems
    assert found.startswith(f"{file.name}: ")
    assert problem in found


def test_a_tensor_twice_in_one_file(copy: Path) -> None:
    file = copy / json.loads((copy / INDEX_NAME).read_text())["weight_map"][WQ]
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode()
    entry = json.dumps(json.loads(header)[WQ])
    header_edit(file, None, f'{{"{WQ}": {entry},{header[1:]}'.encode())
    assert f"{WQ} ({file.name}): is twice in the file" in str(faults(copy))


def test_a_tensor_in_two_files(copy: Path) -> None:
    (copy / INDEX_NAME).unlink()
    safetensors.torch.save_file({SINK: torch.zeros(8)}, copy / "zz.safetensors")
    (problem,) = faults(copy).problems
    assert problem.startswith(f"{SINK} (zz.safetensors): is also in model-")


def test_a_tensor_under_both_names(copy: Path) -> None:
    (copy / INDEX_NAME).unlink()
    theirs = "model.layers.1.self_attn.sinks"
    safetensors.torch.save_file({theirs: torch.zeros(8)}, copy / "zz.safetensors")
    (problem,) = faults(copy).problems
    assert SINK in problem
    assert theirs in problem


def test_an_index_that_names_a_file_that_does_not_exist(copy: Path) -> None:
    file = sorted(copy.glob("*.safetensors"))[2]
    file.unlink()
    (problem,) = faults(copy).problems
    assert problem.startswith(f"{file.name} does not exist; {INDEX_NAME} places ")
    assert "more tensors in it" in problem


def test_an_index_that_places_a_tensor_in_the_wrong_file_or_nowhere(copy: Path) -> None:
    files = [file.name for file in sorted(copy.glob("*.safetensors"))]
    holder = json.loads((copy / INDEX_NAME).read_text())["weight_map"][SINK]
    other = next(file for file in files if file != holder)
    edit_index(copy, lambda weight_map: weight_map.update({SINK: other, "ghost": other}))
    text = str(faults(copy))
    assert f"{SINK}: {INDEX_NAME} places it in {other}, but {holder} holds it" in text
    assert f"ghost: {INDEX_NAME} places it in {other}, but no file holds it" in text


def test_a_tensor_the_index_does_not_list(copy: Path) -> None:
    edit_index(copy, lambda weight_map: weight_map.__delitem__(SINK))
    assert f"{SINK} (model-" in str(faults(copy))
    assert f"is in the file but not in {INDEX_NAME}" in str(faults(copy))


def test_an_index_that_leads_out_of_the_folder(copy: Path) -> None:
    outside = copy.parent / "outside.safetensors"
    safetensors.torch.save_file({SINK: torch.zeros(8)}, outside)
    edit_index(copy, lambda weight_map: weight_map.update({SINK: "../outside.safetensors"}))
    assert "'../outside.safetensors', which is not a plain file name" in str(faults(copy))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\x00"])
def test_an_index_that_is_none(copy: Path, text: str) -> None:
    (copy / INDEX_NAME).write_text(text)
    (problem,) = faults(copy).problems
    assert problem.startswith(INDEX_NAME)


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        CheckpointReader(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"neither .* nor any \*.safetensors"):
        CheckpointReader(tmp_path)


def test_experts_of_one_layer_must_be_stored_alike(copy: Path) -> None:
    scale = EXPERT.replace("weight", "scale")
    (copy / INDEX_NAME).unlink()
    for file in copy.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        tensors.pop(scale, None)
        if EXPERT in tensors:
            tensors[EXPERT] = torch.zeros(64, 32, dtype=torch.bfloat16)
        safetensors.torch.save_file(tensors, file)
    (problem,) = faults(copy).problems
    assert problem.startswith(f"{EXPERT} (model-")
    assert "stored as plain, but layers.4.ffn.experts.0.w1.weight as fp4" in problem


def test_expert_formats_must_be_those_of_the_configuration(sound: Path) -> None:
    error = faults(sound, tiny_config(expert_dtype="fp8"))
    assert "has dtype int8, expected float8_e4m3fn" in str(error)
    assert len(error.problems) == 2 * 7 * 12 * 3


def test_draft_blocks_may_be_absent_if_the_caller_says_so(tmp_path: Path, sound: Path) -> None:
    main = {name: tensor for name, tensor in random_tensors(tiny_config()) if not name.startswith("mtp.")}
    folder = write_checkpoint(tmp_path / "main", tiny_config(), main, drafts=False)
    validate(CheckpointReader(folder), tiny_config(), drafts=False)
    assert all(problem.startswith("mtp.0.") for problem in faults(folder).problems)
    without = tiny_config(compress_ratios=[0, 16, 4, 16, 4, 0])
    validate(CheckpointReader(folder), without)
    assert "not a tensor of this model (compress_ratios has no draft entry)" in str(faults(sound, without))


def test_many_faults_come_in_one_error_that_shows_twenty(copy: Path) -> None:
    for file in sorted(copy.glob("*.safetensors"))[1:]:
        file.unlink()
    (copy / INDEX_NAME).unlink()
    error = faults(copy)
    assert len(error.problems) > 100
    assert str(error).count("\n  - ") == 20
    assert f"and {len(error.problems) - 20} more" in str(error)


# --- SHA-256 ---


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("form", ["SHA256SUMS", "single", "listing", "given"])
def test_hashes(copy: Path, form: str) -> None:
    file = sorted(copy.glob("*.safetensors"))[0]
    given_ = None
    if form == "SHA256SUMS":
        (copy / "SHA256SUMS").write_text("".join(f"{digest(f)}  {f.name}\n" for f in copy.glob("*.safetensors")))
    elif form == "single":
        (copy / f"{file.name}.sha256").write_text(digest(file).upper())
    elif form == "listing":
        (copy / "all.sha256").write_text(f"{digest(file)} *{file.name}\n\n")
    else:
        given_ = {file.name: digest(file)}
    validate(CheckpointReader(copy), tiny_config(), hashes=given_)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # a flipped bit that no other check can see
    file.write_bytes(data)
    (problem,) = faults(copy, hashes=given_, values=False).problems
    assert problem.startswith(f"{file.name}: has SHA-256 {digest(file)}")


def test_hashes_of_nothing_and_lines_that_are_none(copy: Path) -> None:
    (copy / "SHA256SUMS").write_text(f"{'0' * 64}  absent.safetensors\nnonsense\n")
    assert faults(copy).problems == (
        "SHA256SUMS: 'nonsense' is not a line of SHA-256 sums",
        "absent.safetensors: is listed in SHA256SUMS but does not exist",
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.data())
def test_flipping_any_byte_of_a_header_never_crashes(sound: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever a damaged header says, the outcome is a checkpoint or a CheckpointError."""
    folder = Path(shutil.copytree(sound, tmp_path / "flip", dirs_exist_ok=True))
    file = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    position = data.draw(st.integers(0, 8 + length - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    try:
        reader = CheckpointReader(folder)
        validate(reader, tiny_config())
        for name in reader:
            reader.load(name)
    except CheckpointError:
        pass
