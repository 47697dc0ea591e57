"""Writing a bank's folder so that a save that fails leaves what was there before."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextmanager
def staged_folder(directory: str | os.PathLike) -> Iterator[Path]:
    """A fresh folder to write into, whose files move into `directory` when the block ends without an error.

    After an error nothing in `directory` has changed. Files of `directory` that the block does not write stay, but for the weights
    of an earlier save, which new ones replace. A process killed while the files move may leave a mixture.

    Raises:
        NotADirectoryError: `directory` is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; give a folder to save into")
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    # Inside the folder, for what is beside it may be read-only or on another disk, where moving is not renaming.
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        yield staging
        written = {path.name for path in staging.iterdir()}
        for name in sorted(written):
            os.replace(staging / name, directory / name)
        if any(_WEIGHTS.fullmatch(name) for name in written):
            for path in directory.iterdir():
                if _WEIGHTS.fullmatch(path.name) and path.name not in written:
                    path.unlink()
    except BaseException:
        if created:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
