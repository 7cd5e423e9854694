"""What a run has measured so far: pieces that appear whole by rename, so that a killed run goes on where it was."""

import json
from pathlib import Path
from typing import Any

from ..errors import UsageError, shown
from ..sources.files import holds_something, write_whole
from ..sources.structured import read_json

FORMAT = 1


class Kept:
    """Hold JSON values by name, in a folder or, where there is none, in memory.

    Args:
        output_dir: a new or empty folder, or that of an earlier run; None for memory.
        identity: what an earlier run must have in common with this one, as JSON.

    Raises:
        UsageError: the folder holds something else, or a run with another identity, with the first difference.
    """

    def __init__(self, output_dir: Path | None, identity: dict[str, Any]):
        self.folder = None if output_dir is None else output_dir / "measured"
        self._values: dict[str, Any] = {}
        if self.folder is None:
            return
        wanted = json.loads(json.dumps({"format": FORMAT, **identity}))
        known = self.folder / "settings.json"
        if known.is_file():
            found = read_json(known)
            for key in wanted:
                if not isinstance(found, dict) or found.get(key) != wanted[key]:
                    has = found.get(key) if isinstance(found, dict) else found
                    raise UsageError(
                        f"output folder {str(output_dir)!r} holds a plan with {key} = {shown(has)}, not "
                        f"{shown(wanted[key])}: name another folder to start anew"
                    )
            return
        if output_dir.is_file() or holds_something(output_dir):
            raise UsageError(f"output folder {str(output_dir)!r} is not empty and holds no earlier plan: name another")
        self.folder.mkdir(parents=True)
        write_whole(known, json.dumps(wanted, indent=1).encode())

    def get(self, name: str) -> Any:
        """Return the value of that name; None where there is none yet."""
        if self.folder is not None and name not in self._values:
            path = self.folder / f"{name}.json"
            self._values[name] = read_json(path) if path.is_file() else None
        return self._values.get(name)

    def put(self, name: str, value: Any) -> Any:
        """Keep a value under a name, and return it as `get` will."""
        data = json.dumps(value)
        if self.folder is not None:
            write_whole(self.folder / f"{name}.json", data.encode())
        self._values[name] = json.loads(data)
        return self._values[name]
