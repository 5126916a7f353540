"""Whether an uploaded file is what jobs can learn from, said line by line; in bounded memory.

Owns: the check of every row, the first faults in words, and the process of its own that files of a foreign binary
format or of many rows are read in, which may have so much memory and time and no more. Does not own: how formats hold
rows (`bon_algos.row_files`), what a row becomes (`bon_algos.uploaded`). No fault repeats what a file holds.

`python -m service.file_check MODEL_DIRECTORY WINDOW < FILE` prints the findings.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
from pathlib import Path
from time import time
from typing import BinaryIO, Final

from bon_algos.chat import ChatTokenizer
from bon_algos.contracts import Record, RowFault, TrainingRow
from bon_algos.row_files import Row, RowFormat, UnreadableFile, format_of, rows_of
from bon_algos.uploaded import Source, UnfitRow, group_of
from service.errors import GatewayError, InvalidField
from service.json_body import parse_model
from service.tokenizer_files import read_tokenizer

MAX_FAULTS: Final = 20
SMALL_BYTES: Final = 2**20
"""JSONL up to so much is read where it arrived."""
MEMORY_BYTES: Final = 2 * 2**30
"""Of address space, libraries and tokenizer included."""
SECONDS: Final = 600.0


class Findings(Record):
    format: RowFormat
    rows: int = 0
    """Without fault."""
    faults: tuple[RowFault, ...] = ()
    has_rewards: bool = False
    longest_completion: int = 0
    """Tokens."""


def check(stream: BinaryIO, tokenizer: ChatTokenizer, window: int) -> Findings:
    """Until the end or MAX_FAULTS of the rows. Raises InvalidField for a file of another format."""
    form = _format(stream)
    checker = _Checker(tokenizer, window)
    try:
        for row in rows_of(stream, form):
            checker.look_at(row)
            if len(checker.faults) == MAX_FAULTS:
                break
    except UnreadableFile as error:
        checker.faults.append(RowFault(line=error.line, message=error.message))
    except MemoryError:
        checker.faults.append(_bomb())
    if not checker.faults and checker.rows == 0:
        checker.faults.append(RowFault(line=None, message="has no rows"))
    return Findings(
        format=form,
        rows=checker.rows,
        faults=tuple(checker.faults),
        has_rewards=bool(checker.has_rewards),
        longest_completion=checker.longest_completion,
    )


async def check_apart(path: Path, tokenizer: ChatTokenizer, window: int, model_directory: Path) -> Findings:
    """The same of a file, where it can do no harm. Raises InvalidField as above, RuntimeError where the process fails
    by what is not the file's fault: one that takes too much is ended by a signal."""
    with path.open("rb") as stream:
        form = _format(stream)
        if form == "jsonl" and path.stat().st_size <= SMALL_BYTES:
            return await asyncio.to_thread(check, stream, tokenizer, window)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "service.file_check", str(model_directory), str(window),
            stdin=stream, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, env=_environment(),
        )  # fmt: skip
    try:
        async with asyncio.timeout(SECONDS):
            said, _ = await process.communicate()
            exit_code = await process.wait()
    except TimeoutError:
        too_long = RowFault(line=None, message=f"takes more than {SECONDS:.0f} s to read")
        return Findings(format=form, faults=(too_long,))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if exit_code > 0:
        raise RuntimeError(f"the process that checks a file ended with {exit_code}")
    return Findings.model_validate_json(said) if exit_code == 0 else Findings(format=form, faults=(_bomb(),))


class _Checker:
    """What the rows of a file had in them so far."""

    def __init__(self, tokenizer: ChatTokenizer, window: int) -> None:
        self._tokenizer = tokenizer
        self._source = Source("file-", _NOBODY, _NOBODY_S_REWARDS, "", window, 0, time())
        self._ids: set[int] = set()
        self.faults: list[RowFault] = []
        self.rows = 0
        self.has_rewards: bool | None = None
        self.longest_completion = 0

    def look_at(self, row: Row) -> None:
        message = self._fault_of(row)
        if message is None:
            self.rows += 1
        else:
            self.faults.append(RowFault(line=row.line, message=message))

    def _fault_of(self, row: Row) -> str | None:
        try:
            read = parse_model(row.document, TrainingRow)
            group = group_of(read, row.line, self._source, self._tokenizer)
        except GatewayError as error:
            return error.message.removeprefix("body ")
        except UnfitRow as error:
            return str(error)
        # A hash of 64 bits each: the names of a million rows may be a file's size again.
        if read.id is not None and hash(read.id) in self._ids:
            return "id is that of an earlier row"
        self._ids |= set() if read.id is None else {hash(read.id)}
        longest = max(len(candidate.token_ids) for candidate in group.candidates)
        self.longest_completion = max(self.longest_completion, longest)
        if self.has_rewards is None:
            self.has_rewards = read.rewards is not None
        is_alike = self.has_rewards == (read.rewards is not None)
        return None if is_alike else "rewards are given by some rows and not by others: give all or none"


_NOBODY: Final = "pol-" + "0" * 16
_NOBODY_S_REWARDS: Final = "rm-" + "0" * 16


def _format(stream: BinaryIO) -> RowFormat:
    try:
        return format_of(stream)
    except UnreadableFile as error:
        raise InvalidField(f"file {error.message}", param="file") from None


def _bomb() -> RowFault:
    return RowFault(line=None, message="cannot be read within the memory for it: a row or a batch of rows is too large")


def _environment() -> dict[str, str]:
    """The gateway's without its secrets' places; one thread and an allocator that asks for what it needs."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(model_directory: str, window: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    tokenizer = read_tokenizer(Path(model_directory))
    sys.stdout.write(check(sys.stdin.buffer, tokenizer, int(window)).model_dump_json())
    sys.stdout.flush()
    # All is said: how a library's threads end must not make an abort of it, which would read as a file too large.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:3])
