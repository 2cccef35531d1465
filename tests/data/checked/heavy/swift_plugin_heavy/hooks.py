import torch  # noqa: F401
from swift_core import hookimpl
from swift_core.types import Record

ROWS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]


@hookimpl
def swift_open_dataset(dataset_id, config):
    return [Record(row, "row 0") for row in ROWS] if dataset_id == "heavy" else None
