"""python -m lite_dil.doctor.worker BACKEND NAME...: run these checks, and print a JSON object for each as it is done.

They run in a separate process; if that dies, the remaining checks run in another one.
"""

from __future__ import annotations

import json
import sys
import time

from lite_dil.base.files import work_folder
from lite_dil.base.start import quiet_bars, start
from lite_dil.models.find import cache_dir


def main(backend: str, names: list[str]) -> None:
    """Run the checks in order."""
    start()
    from lite_dil.backends.registry import import_library
    from lite_dil.doctor.checks import CHECKS, Subject

    import_library(backend)
    quiet_bars()

    with work_folder(cache_dir() / "doctor") as folder:
        subject = Subject(backend, folder)
        for name in names:
            print(json.dumps({"starts": name}), flush=True)
            since = time.monotonic()
            ok, text = CHECKS[name](subject)
            print(
                json.dumps({"name": name, "ok": ok, "text": text, "seconds": round(time.monotonic() - since, 1)}), flush=True
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
