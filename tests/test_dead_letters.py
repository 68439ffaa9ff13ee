"""Dead letters on disk: each position once, whatever crashes and repeats."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from pipelines.dead_letters import DeadLetterFile, letter_key
from pipelines.errors import SetupError
from pipelines.events import DeadLetter


def letter(offset: int, row: int = 0, source: str = "clicks") -> DeadLetter:
    return DeadLetter(source, 1, offset, row, "expected JSON.", "{\n\N{REPLACEMENT CHARACTER}")


def offsets(path: Path) -> list[tuple[str, int, int]]:
    found = [DeadLetter(**orjson.loads(line)) for line in path.read_bytes().splitlines()]
    return [(one.source, one.offset, one.row) for one in found]


def test_letters_that_come_again_are_written_once(tmp_path: Path) -> None:
    path = tmp_path / "dead_letters.jsonl"
    file = DeadLetterFile(path)
    assert file.append([letter(1), letter(2), letter(1)]) == 2
    assert file.append([letter(2), letter(2, row=1), letter(2, source="impressions")]) == 2
    again = DeadLetterFile(path)
    assert len(again) == 4 and again.append([letter(1), letter(3)]) == 1
    assert offsets(path) == [
        ("clicks", 1, 0),
        ("clicks", 2, 0),
        ("clicks", 2, 1),
        ("impressions", 2, 0),
        ("clicks", 3, 0),
    ]


def test_a_line_cut_short_by_a_crash_is_removed_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "dead_letters.jsonl"
    DeadLetterFile(path).append([letter(1), letter(2)])
    path.write_bytes(path.read_bytes()[:-9])
    file = DeadLetterFile(path)
    assert len(file) == 1 and file.append([letter(1), letter(2)]) == 1
    assert offsets(path) == [("clicks", 1, 0), ("clicks", 2, 0)]


def test_two_writers_at_once_write_each_letter_once(tmp_path: Path) -> None:
    path = tmp_path / "dead_letters.jsonl"
    first, second = DeadLetterFile(path), DeadLetterFile(path)
    assert first.append([letter(1), letter(2)]) == 2
    assert second.append([letter(1), letter(2), letter(3)]) == 1
    assert first.append([letter(3), letter(4)]) == 1
    assert second.append([letter(4)]) == 0
    assert [offset for _, offset, _ in offsets(path)] == [1, 2, 3, 4]
    assert len(first) == len(second) == len(DeadLetterFile(path)) == 4


def test_letters_are_read_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "dead_letters.jsonl"
    DeadLetterFile(path).append([letter(1)])
    assert DeadLetter(**orjson.loads(path.read_bytes())) == letter(1)
    assert letter_key(letter(1, row=3)) == b"clicks:1:1:3"


def test_no_letters_make_no_file(tmp_path: Path) -> None:
    assert DeadLetterFile(tmp_path / "none.jsonl").append([]) == 0
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("content", [b"hello\n", b"[1]\n", b'{"source": "clicks"}\n'])
def test_a_file_of_something_else_is_an_error_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "dead_letters.jsonl"
    path.write_bytes(content)
    with pytest.raises(SetupError, match="holds something other than dead letters"):
        DeadLetterFile(path)
    assert path.read_bytes() == content


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="cannot write dead letters"):
        DeadLetterFile(tmp_path / "absent" / "dead_letters.jsonl").append([letter(1)])
