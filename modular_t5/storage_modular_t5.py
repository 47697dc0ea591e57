"""Writing a bank's folder so that a save that fails leaves what was there before."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_folder(directory: str | os.PathLike) -> Iterator[Path]:
    """A fresh folder to write into, whose files move into `directory` when the block ends without an error.

    After an error nothing in `directory` has changed. Files of `directory` that the block does not write stay, but for the weights
    of an earlier save, which the new ones replace. A process killed while the files move may leave a mixture.

    Raises:
        NotADirectoryError: `directory` is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; give a folder to save into")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, so that moving is renaming within one file system.
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.saving-", dir=directory.parent))
    try:
        yield staging
        directory.mkdir(exist_ok=True)
        written = sorted(path for path in staging.iterdir())
        for path in written:
            os.replace(path, directory / path.name)
        names = {path.name for path in written}
        if any(name.startswith("model") and ".safetensors" in name for name in names):
            for stale in directory.glob("model*.safetensors*"):
                if stale.name not in names:
                    stale.unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)
