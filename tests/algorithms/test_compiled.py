"""What is kept of compiled functions between processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import thornback

ASK = """
import numpy as np
from thornback.algorithms import promise_of

one = np.array([1])
print(promise_of(np.array([0.5], np.float32), one, np.zeros((1, 8)), one - 1))
"""


def test_a_change_in_one_file_reaches_what_another_has_compiled(tmp_path) -> None:
    package = tmp_path / "thornback"
    shutil.copytree(Path(next(iter(thornback.__path__))), package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def asked() -> float:
        done = subprocess.run(
            [sys.executable, "-c", ASK], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert asked() == 0.5
    called = package / "algorithms" / "speculation.py"  # by `promise_of`, which is in another file
    changed = called.read_text().replace("return (record[_ACCEPTED]", "return 0.5 * (record[_ACCEPTED]")
    assert changed != called.read_text()
    called.write_text(changed)
    assert asked() == 0.25
