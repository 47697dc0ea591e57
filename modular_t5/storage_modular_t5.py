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

    After an error, in the block or while files move, `directory` is as it was. Files of `directory` that the block does not write
    stay, but for the weights of an earlier save, which new ones replace. A process that is killed leaves a `.saving-*` folder, and
    may leave a mixture if it was moving files.

    Raises:
        NotADirectoryError: `directory` is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; give a folder to save into")
    created = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    # Inside the folder, for what is beside it may be read-only or on another disk, where moving is not renaming.
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    new, old = staging / "new", staging / "old"
    new.mkdir()
    old.mkdir()
    done = False
    try:
        yield new
        _swap(directory, new, old)
        done = True
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not done:
            for folder in created:
                try:
                    folder.rmdir()
                except OSError:  # not empty: somebody else saved there meanwhile
                    break


def _swap(directory: Path, new: Path, old: Path) -> None:
    """Move the files of `new` into `directory` and those they replace into `old`, or, after an error, nothing."""
    written = sorted(path.name for path in new.iterdir())
    has_weights = any(_WEIGHTS.fullmatch(name) for name in written)
    replaced = [path.name for path in directory.iterdir() if path.name in written or (has_weights and _WEIGHTS.fullmatch(path.name))]
    moved: list[tuple[Path, Path]] = []
    try:
        for name, source, target in [*((name, directory, old) for name in replaced), *((name, new, directory) for name in written)]:
            os.replace(source / name, target / name)
            moved.append((source / name, target / name))
    except BaseException:
        for source, target in reversed(moved):
            os.replace(target, source)
        raise
