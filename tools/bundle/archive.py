"""What makes a folder of wheels a bundle: checksums, how to install it, a tar, and its parts."""

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

SUMS = "SHA256SUMS"
HOW = "INSTALL.txt"
BLOCK_BYTES = 1 << 20


def describe(folder: Path, package: str, left_out: Sequence[str]) -> str:
    """Write checksums and instructions into the folder; returns the line that installs it.

    Where something is left out, pip must not look for it: the target's own may be another version.
    """
    wheels = sorted(folder.glob("*.whl"))
    (folder / SUMS).write_text("".join(f"{digest(path)}  {path.name}\n" for path in wheels))
    install = (
        "pip install --no-index --no-deps *.whl"
        if left_out
        else f"pip install --no-index --find-links . {package}"
    )
    missing = f"Not in here, to be there already: {', '.join(left_out)}.\n" if left_out else ""
    line = f"sha256sum --check --quiet {SUMS} && {install}"
    how = f"In this folder, with the pip of the environment to install into:\n\n    {line}\n"
    (folder / HOW).write_text(f"{how}\n{missing}" if missing else how)
    return line


def pack(folder: Path) -> Path:
    """Put the folder into a tar beside it, the same bytes for the same files."""
    path = folder.with_name(f"{folder.name}.tar")

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, 0, "", ""
        entry.mode = 0o755 if entry.isdir() else 0o644
        return entry

    with tarfile.open(path, "w") as archive:
        archive.add(folder, folder.name, recursive=False, filter=plain)
        for file in sorted(folder.iterdir()):
            archive.add(file, f"{folder.name}/{file.name}", filter=plain)
    return path


def split(path: Path, part_bytes: int) -> list[Path]:
    """Cut a file into parts of at most so many bytes, in the order of their names; it goes."""
    parts: list[Path] = []
    with path.open("rb") as source:
        while True:
            part = path.with_name(f"{path.name}.{len(parts):03}")
            with part.open("wb") as output:
                written = 0
                for block in blocks(source, part_bytes):
                    written += output.write(block)
            if not written:
                part.unlink()
                break
            parts.append(part)
    path.unlink()
    return parts


def write_sums(files: Sequence[Path]) -> Path:
    """Write the checksums of the tar, or of its parts, beside them."""
    name = files[0].name if len(files) == 1 else files[0].stem
    path = files[0].with_name(f"{name}.sha256")
    path.write_text("".join(f"{digest(file)}  {file.name}\n" for file in files))
    return path


def blocks(source: BinaryIO, limit: int) -> Iterator[bytes]:
    """Yield the next ``limit`` bytes."""
    while limit and (block := source.read(min(limit, BLOCK_BYTES))):
        limit -= len(block)
        yield block


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
