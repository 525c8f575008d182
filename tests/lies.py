"""Files in the safetensors format whose headers do not tell the truth."""

import json
from typing import Any

DATA = bytes(8)


def file_of(header: Any, size: int | None = None) -> bytes:
    """A file with this header, as JSON or bytes, that says of itself to have `size` bytes, and with `DATA`."""
    written = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(written) if size is None else size).to_bytes(8, "little") + written + DATA


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


WHOLE = tensor([2], 0, 8)
LIES = {
    "tensors that overlap": file_of({"a": WHOLE, "b": tensor([1], 0, 4)}),
    "a tensor beyond the end": file_of({"a": tensor([4], 0, 16)}),
    "an offset beyond all files": file_of({"a": tensor([2], 2**63, 2**63 + 8)}),
    "bytes of no tensor": file_of({"a": tensor([1], 0, 4)}),
    "an end before the start": file_of({"a": tensor([1], 8, 4)}),
    "a header longer than the file": file_of({"a": WHOLE}, size=2**20),
    "a header of 2**62 bytes": file_of({"a": WHOLE}, size=2**62),
    "a shape of more bytes": file_of({"a": tensor([3], 0, 8)}),
    "a shape that overflows": file_of({"a": tensor([2**63, 2], 0, 8)}),
    "a shape with a minus": file_of({"a": tensor([-2], 0, 8)}),
    "a side that torch cannot have": file_of({"a": WHOLE, "b": tensor([0, 2**63], 8, 8)}),
    "an unknown type": file_of({"a": tensor([2], 0, 8, "X9")}),
    "a name twice": file_of(f'{{"a": {json.dumps(WHOLE)}, "a": {json.dumps(WHOLE | {"dtype": "I32"})}}}'.encode()),
    "nested too deeply": file_of(b'{"a":' + b"[" * 100_000),
    "text that is not UTF-8": file_of(b'{"\xff": 1}'),
    "a list": file_of([]),
    "nothing": b"",
}
