"""torchrun with quiet failures: a failed rank has said what is wrong; torchrun's own report of it would only hide that."""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        main(sys.argv[1:])
    except ChildFailedError as err:
        sys.exit(max(1, err.get_first_failure()[1].exitcode))
    except SignalException:
        sys.exit(1)
