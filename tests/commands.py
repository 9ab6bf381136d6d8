"""The command line, called in this process."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from vidgen.cli.main import main


def vidgen(*words: str | Path, code: int = 0) -> dict[str, Any]:
    """What a command tells under --json; {} where it fails, as it should with that code."""
    out = StringIO()
    with redirect_stdout(out):
        assert main([*map(str, words), "--json"]) == code
    return json.loads(out.getvalue()) if code == 0 else {}
