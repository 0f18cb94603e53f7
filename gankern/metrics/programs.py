"""Feature networks from files: programs of torch.export (.pt2) and ONNX models (.onnx), without running code from the file.

onnxruntime runs nothing but the operators that it has. `torch.export.load` does: it unpickles what the file marks as pickled,
evaluates expressions, looks functions up by name and loads compiled libraries. So `_check_program` reads the file first, with the
same reader, and lets only what a network without custom code needs: plain tensors, ATen operators, arithmetic of sizes.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gankern import checks

OP = "features"
SUFFIXES = (".pt2", ".onnx")

_RECORD = re.compile(
    r"data/weights/(weight_\d+|\w+_weights_config\.json)|data/constants/(tensor_\d+|\w+_constants_config\.json)|models/\w+\.json"
    r"|data/sample_inputs/\w+\.pt|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
)
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file|save)\w+\.\w+|torch\.sym_\w+|math\.\w+"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|getitem)"
)
_EXPRESSION = re.compile(  # what sympy prints of sizes
    r"(?:(?:Symbol|Integer|Add|Mul|Pow|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|Max|Min|Rational|positive|integer|nonnegative"
    r"|True|False|None|[su]\d+)\b|'[su]\d+'|\d+|[-+*/(),=<> ])*"
)
_WORD = re.compile(r"[\w.+-]*")
_LAYOUT = re.compile(r"[\w.\s\[\]{}:,\"\\]*")  # of arguments and results: tuples, lists and dicts
_UNUSED = {"metadata", "guards_code"}  # words for people; conditions that are not compiled, as they are not asked for


def load_program(path: Path, device: torch.device) -> Callable[[Tensor], Any]:
    """What the file computes: float32 [B, ...] on `device` -> its output, or several.

    Raises:
        ValueError: the file is broken, or has what a network does not need.
        RuntimeError: onnxruntime is not installed.
    """
    return _exported(path, device) if path.suffix.lower() == ".pt2" else _onnx(path, device)


def _onnx(path: Path, device: torch.device) -> Callable[[Tensor], Any]:
    try:
        import onnxruntime
    except ImportError:
        raise RuntimeError('features: onnxruntime must be installed, got none (pip install "gankern[onnx]")') from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        checks.fail(ValueError, OP, str(path), "be an ONNX model", first_line(error))
    names = [given.name for given in session.get_inputs()]
    if len(names) != 1:
        checks.fail(ValueError, OP, str(path), "have one input", names)

    def run(samples: Tensor) -> list[Tensor]:
        return [torch.from_numpy(out).to(device) for out in session.run(None, {names[0]: samples.cpu().numpy()})]

    return run


def _exported(path: Path, device: torch.device) -> Callable[[Tensor], Any]:
    content = path.read_bytes()
    _check_program(str(path), content)
    try:
        return torch.export.load(io.BytesIO(content)).module(check_guards=False).to(device)
    except Exception as error:  # a damaged program raises nearly anything
        checks.fail(ValueError, OP, str(path), "be a program of torch.export.save", first_line(error))


def _check_program(name: str, content: bytes) -> None:
    """Refuse a .pt2 file with anything that could be more than a network."""
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(content))
        records = reader.get_all_records()
        texts = {record: json.loads(reader.get_record(record)) for record in records if record.endswith(".json")}
    except (RuntimeError, ValueError, RecursionError) as error:
        checks.fail(ValueError, OP, name, "be a program of torch.export.save", first_line(error))
    strange = next((record for record in records if not _RECORD.fullmatch(record)), None)
    if strange or len(set(records)) < len(records):
        checks.fail(ValueError, OP, name, "hold a network alone", f"the record {strange}" if strange else "one record twice")
    for record, content_of in texts.items():
        found = _foreign(content_of, "")
        if found:
            checks.fail(ValueError, OP, name, "hold a network alone", f"{found[:80]!r} in {record}")
    for record in records:
        if record.startswith("data/sample_inputs/"):
            try:
                torch.load(io.BytesIO(reader.get_record(record)), weights_only=True)
            except Exception:  # what torch.export.load would load all the same
                checks.fail(ValueError, OP, name, "have tensors as its sample inputs", "something else, which could run code")


def _foreign(value: Any, key: str) -> str:
    """The first piece of a program's text that could be code, or ""."""
    if isinstance(value, dict):
        if value.get("use_pickle"):
            return "use_pickle"
        parts = ((k, v) for k, v in value.items() if k not in _UNUSED)
        return next((found for k, v in parts if (found := "" if _WORD.fullmatch(k) else k) or (found := _foreign(v, k))), "")
    if isinstance(value, list):
        return next((found for part in value if (found := _foreign(part, key))), "")
    if not isinstance(value, str):
        return ""
    if key in ("in_spec", "out_spec"):
        return "" if _LAYOUT.fullmatch(value) and "__enum__" not in value and "default" not in value else value
    return "" if {"target": _OPERATOR, "expr_str": _EXPRESSION}.get(key, _WORD).fullmatch(value) else value


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
