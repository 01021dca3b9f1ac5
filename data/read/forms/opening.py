"""Opening: a file of any place, compression and encoding as blocks of UTF-8 bytes, in bounded memory."""

import bz2
import codecs
import io
import lzma
import os
import stat
import zlib
from collections.abc import Iterator
from urllib.parse import urlsplit

from .. import readers

PIECE = 8192  # compressed bytes decompressed at once: of the worst gzip 8 MB
PIECES = {".zst": 1024}  # of the worst zstd 32 MB
GATHERED = 2**18
UTF8 = ("utf-8", "utf-8-sig", "ascii")
BOM = codecs.BOM_UTF8
MAGIC = {".gz": (b"\x1f\x8b",), ".zst": (b"\x28\xb5\x2f\xfd", b"*M\x18"), ".xz": (b"\xfd7zXZ\0",), ".bz2": (b"BZh",)}
UNSAID = {".gz": b"\x1f\x8b\x08", ".zst": MAGIC[".zst"][0], ".xz": MAGIC[".xz"][0], ".bz2": b"BZh91A"}
LINKED = "://"


def is_remote(name: str) -> bool:
    return LINKED in name


def path_of(name: str) -> str:
    """Return a file's name without what a URL has behind it."""
    return urlsplit(name).path if name.startswith(("http://", "https://")) else name


def compression(name: str) -> str | None:
    """Return .gz, .zst, .xz, .bz2, or None."""
    extension = os.path.splitext(path_of(name))[1].lower()
    return extension if extension in MAGIC else None


def extension(name: str) -> str:
    """Return what a file's name ends in, its compression aside."""
    path = path_of(name)
    return os.path.splitext(path.removesuffix(os.path.splitext(path)[1]) if compression(name) else path)[1].lower()


def is_utf8(encoding: str | None) -> bool:
    return encoding is None or codecs.lookup(encoding).name in UTF8


def is_plain(name: str, encoding: str | None = None) -> bool:
    """Tell whether a file's bytes are the text's own and can be sought: then it can be cut into parts."""
    return not is_remote(name) and compression(name) is None and is_utf8(encoding)


def file_system(name: str):
    """Return (fsspec's file system, path in it). Raises ValueError where what serves it is not installed."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(name)
    except ImportError as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())}: install it with pip.") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}; there are hf://, s3://, gs://, https:// and what fsspec knows.") from None


def size(name: str) -> int | None:
    """Return a file's bytes as they are stored; None where its place does not say."""
    if not is_remote(name):
        return os.path.getsize(name)
    system, path = file_system(name)
    return system.info(path).get("size")


def open_stored(name: str, whole: bool = True):
    """Open a file as it is stored. Of a Hub repository, the whole file comes into the cache of the Hub first.

    whole: False looks at a remote file without fetching all of it.
    """
    if not is_remote(name):
        if not stat.S_ISREG(os.stat(name).st_mode):
            raise ValueError("it is no regular file; a text is read more than once: write it to a file first")
        return open(name, "rb")
    system, path = file_system(name)
    if name.startswith("hf://"):
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        at = system.resolve_path(path)
        where = {"repo_id": at.repo_id, "filename": at.path_in_repo, "repo_type": at.repo_type, "revision": at.revision}
        if whole or isinstance(try_to_load_from_cache(**where), str):
            return open(hf_hub_download(**where), "rb")
    return system.open(path, "rb")


def open_bytes(name: str, encoding: str | None = None, whole: bool = True) -> io.BufferedReader:
    """Open a file's text as UTF-8 bytes, decompressed.

    Raises:
        ValueError: What the file begins with is not what its name says.
    """
    stored = open_stored(name, whole)
    file = stored if isinstance(stored, io.BufferedReader) else io.BufferedReader(stored, 2**20)
    kind, begins = compression(name), file.peek(6)[:6]
    if kind is not None and begins and not any(magic in begins for magic in MAGIC[kind]):
        file.close()
        raise ValueError(f"its name says {kind}, but it begins with {begins!r}, which no {kind} file does: rename it")
    if kind is None:
        if other := next((other for other, magic in UNSAID.items() if begins.startswith(magic)), None):
            file.close()
            raise ValueError(f"it begins as {other} files do: name it with {other} at its end")
        if is_utf8(encoding) and begins.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            file.close()
            raise ValueError("it begins as UTF-16 does: set encoding=utf-16")
    if kind is not None:
        file = io.BufferedReader(Decompressed(file, kind), GATHERED)
    return file if is_utf8(encoding) else io.BufferedReader(Transcoded(file, encoding), GATHERED)


def _engine(kind: str):
    if kind == ".zst":
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()  # 2 GiB: `zstd --long=31`
    return {".gz": lambda: zlib.decompressobj(31), ".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}[kind]()


class _Made(io.RawIOBase):
    """A file whose bytes `_make()` gives, b"" at its end; those made before an error are read before it is raised."""

    def __init__(self, file):
        self._file, self._held, self._error = file, memoryview(b""), None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if not len(self._held) and self._error is None:
            made, much = [], 0
            try:
                while much < GATHERED and (piece := self._make()):
                    made.append(piece)
                    much += len(piece)
            except Exception as error:
                self._error = error
            self._held = memoryview(b"".join(made))
        if not len(self._held) and self._error is not None:
            raise self._error
        taken = min(len(buffer), len(self._held))
        buffer[:taken], self._held = self._held[:taken], self._held[taken:]
        return taken

    def close(self) -> None:
        self._file.close()
        super().close()


class Decompressed(_Made):
    """What a compressed file holds, its streams one after another; one that is cut off is an EOFError."""

    def __init__(self, file, kind: str):
        super().__init__(file)
        self._kind, self._engine, self._left = kind, None, b""

    def _make(self) -> bytes:
        while True:
            if getattr(self._engine, "needs_input", True):  # bz2's and lzma's hold back what is more than was asked for
                if not (data := self._left or self._file.read(PIECES.get(self._kind, PIECE))):
                    break
            else:
                data = b""
            self._left = b""
            if self._engine is None:
                if not (data := data.lstrip(b"\0")):  # padding
                    continue
                self._engine = _engine(self._kind)
            try:
                bounded = (GATHERED,) if hasattr(self._engine, "needs_input") else ()
                made = self._engine.decompress(data, *bounded)
            except Exception as error:  # each library has its own
                raise ValueError(f"its {self._kind} data are damaged: {' '.join(str(error).split())}") from error
            if self._engine.eof:
                self._left, self._engine = self._engine.unused_data, None
            if made:
                return made
        if self._engine is not None:
            raise EOFError(f"it is cut off: its {self._kind} data end too early")
        return b""


class Transcoded(_Made):
    """A file of another encoding as UTF-8."""

    def __init__(self, file, encoding: str):
        super().__init__(file)
        self._decoder, self._encoding = codecs.getincrementaldecoder(encoding)(), encoding

    def _make(self) -> bytes:
        while data := self._file.read1(GATHERED):
            if made := self._decoded(data):
                return made
        return self._decoded(b"", last=True)

    def _decoded(self, data: bytes, last: bool = False) -> bytes:
        try:
            return self._decoder.decode(data, last).encode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"it is not {self._encoding}: {error.reason} at byte {error.object[error.start]:#04x}"
            ) from None


def take(file: io.BufferedReader, count: int) -> tuple[bytes, Exception | None, bool]:
    """Read count bytes, fewer at the end or before an error; return them, the error, and whether no more comes."""
    held, much = [], 0
    try:
        while much < count and (piece := file.read1(count - much)):
            held.append(piece)
            much += len(piece)
    except Exception as error:
        return b"".join(held), error, True
    return b"".join(held) if len(held) != 1 else held[0], None, much < count


def blocks(file: io.BufferedReader) -> Iterator[bytes]:
    """Yield what a file holds in blocks of READ_BYTES; what comes before an error is given out before it is raised."""
    ended = False
    while not ended:
        block, failed, ended = take(file, readers.READ_BYTES)
        if block:
            yield block
        if failed is not None:
            raise failed


def skip(file: io.BufferedReader, count: int) -> None:
    """Pass over bytes of a file that cannot be sought."""
    while count and (passed := len(file.read1(min(count, readers.READ_BYTES)))):
        count -= passed


def beginning(name: str, encoding: str | None, count: int) -> tuple[bytes, Exception | None]:
    """Return a text's first bytes, at most count, and what is wrong with the data behind them, if anything is."""
    with open_bytes(name, encoding, whole=False) as file:
        held, failed, _ = take(file, count)
    if failed is not None and not held:
        raise failed
    return held.removeprefix(BOM), failed
