from swift_core import hookimpl
from swift_core.types import Record

ROWS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]


class Shifting:
    """Other rows each time."""

    times = 0

    def __iter__(self):
        self.times += 1
        yield Record(ROWS[0], f"row {self.times}")


@hookimpl
def swift_open_dataset(dataset_id, config):
    return Shifting() if dataset_id == "shifting" else None
