"""Files, folders, splits and the hub: what is read, where each row stands, and the one line that an error shows."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from swift_core.errors import RequestError
from swift_core.testing import DatasetContract
from swift_plugin_huggingface.config import HuggingFaceConfig
from swift_plugin_huggingface.dataset import open_dataset

LINES = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(10)]
JSONL = "".join(json.dumps(line) + "\n" for line in LINES)


def read(path: Path | str, **options: Any) -> list[Any]:
    return list(open_dataset(HuggingFaceConfig(path=str(path), **options)))


def questions(records: list[Any]) -> list[str]:
    assert [record.refused for record in records if record.refused] == []
    return [record.row["messages"][0]["content"] for record in records]


class TestHuggingFace(DatasetContract):
    distribution, id = "swift-plugin-huggingface", "huggingface"

    @pytest.fixture
    def config(self, tmp_path: Path) -> HuggingFaceConfig:
        file = tmp_path / "rows.jsonl"
        file.write_text(JSONL + "{broken\n", encoding="utf-8")
        return HuggingFaceConfig(path=str(file))


def test_jsonl_places_and_bad_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [
        '{"query": "a\u2028b", "response": "é"}', "", '{"query": "x", ', '["a"]', '{"query": "\\ud83d", "response": "y"}',
        '{"query": "\\ud83d\\ude00", "response": "y"}', '{"other": 1}',
    ]  # fmt: skip
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    records = read(file)
    assert [record.where for record in records] == [f"{file}:{n}" for n in (1, 3, 4, 5, 6, 7)]
    assert records[0].row["messages"][0]["content"] == "a\u2028b"
    assert records[4].row["messages"][0]["content"] == "😀"
    reasons = [record.refused for record in records]
    assert reasons[0] is reasons[4] is None
    assert reasons[1].startswith("not valid JSON: ")
    assert reasons[2] == "a row must be an object with keys, not a list"
    assert "half of a surrogate pair" in reasons[3]
    assert reasons[5].startswith("unrecognised row; keys found: other.")


def test_reads_anew_each_time_and_lazily(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(JSONL + "\xff", encoding="latin1")  # the end cannot be decoded: only a stream gets this far
    dataset = open_dataset(HuggingFaceConfig(path=str(file)))
    for _ in range(2):
        records = iter(dataset)
        assert [next(records).row["messages"][0]["content"] for _ in range(10)] == [f"q{n}" for n in range(10)]
    with pytest.raises(RequestError, match=r"rows.jsonl': not UTF-8 text \(byte 0xff\)"):
        next(records)


def test_json_forms(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    for text in (json.dumps(LINES), json.dumps({"data": LINES}), json.dumps({"data": LINES}, indent=1)):
        file.write_text(text)
        records = read(file)
        assert questions(records) == [f"q{n}" for n in range(10)]
        assert records[2].where == f"{file}: row 3"
    file.write_text(JSONL)
    assert [record.where for record in read(file)][2] == f"{file}:3"
    file.write_text(json.dumps(LINES[0], indent=2))
    assert questions(read(file)) == ["q0"]
    file.write_text('[{"query": 1},\n {"query" 2}]')
    with pytest.raises(RequestError, match=r"rows.json': not valid JSON at line 2, column 11"):
        read(file)


def test_tables(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    long = "x" * 200_000
    file.write_text(f'q,a,label\n"two\nlines","say ""hi""",True\nq2,{long},2\nonly\nq3,a3,spam\n', encoding="utf-8")
    records = read(file, columns={"q": "query", "a": "response"})
    assert [record.where for record in records] == [f"{file}:{n}" for n in (2, 4, 5, 6)]
    assert [message["content"] for message in records[0].row["messages"]] == ["two\nlines", 'say "hi"']
    assert records[1].row["messages"][1]["content"] == long
    assert records[2].refused == "1 cells; the header names 3 columns"
    assert [record.row.get("label") for record in records] == [True, 2, None, "spam"]
    tsv = tmp_path / "rows.tsv"
    tsv.write_text("query\tresponse\nwhat, now?\tthis\n")
    assert questions(read(tsv)) == ["what, now?"]
    file.write_text('query,response\nq,a\n"open,a\nb,c\n')
    with pytest.raises(RequestError, match="line 3 is not a valid row"):
        read(file)
    file.write_text("query,query\n")
    with pytest.raises(RequestError, match="two columns have the same name"):
        read(file)


def test_txt_is_a_document_a_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("first line\n\n  second\n")
    records = read(file)
    assert [record.row["messages"] for record in records] == [
        [{"role": "assistant", "content": "first line"}],
        [{"role": "assistant", "content": "  second"}],
    ]
    assert records[1].where == f"{file}:3"


def test_gzip(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(JSONL.encode()))
    assert questions(read(file)) == [f"q{n}" for n in range(10)]
    file.write_bytes(gzip.compress(JSONL.encode())[:-12])
    with pytest.raises(RequestError, match=r"rows.jsonl.gz' cannot be read"):
        read(file)


def test_columnar_files(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import ipc, parquet

    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    rows = [{"messages": [{"role": "user", "content": "q0"}, called]}, {"messages": [{"role": "user", "content": "q1"}]}]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "rows.parquet")
    with ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    with ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "stream.arrow", "file.arrow"):
        records = read(tmp_path / name)
        assert questions(records) == ["q0", "q1"]
        assert records[1].where == f"{tmp_path / name}: row 2"
        assert records[0].row["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
        assert records[1].row["messages"] == [{"role": "user", "content": "q1"}]
    for name in ("rows.parquet", "stream.arrow"):
        (tmp_path / name).write_bytes(b"ARROW1 nothing of the kind")
        with pytest.raises(RequestError, match=f"{name}' is not a readable"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (None, range(10)), ("train", range(10)), ("train[:3]", range(3)), ("[7:]", range(7, 10)), ("train[:25%]", range(2)),
        ("train[25%:]", range(2, 10)), ("[-2:]", (8, 9)), ("[:-80%]", range(2)), ("[2:400]", range(2, 10)), ("[50%:1]", ()),
    ],
)  # fmt: skip
def test_slices(tmp_path: Path, split: str | None, expected: Any) -> None:
    (tmp_path / "rows.jsonl").write_text(JSONL)
    assert questions(read(tmp_path / "rows.jsonl", split=split)) == [f"q{n}" for n in expected]


def test_slices_are_those_of_the_datasets_library(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "rows.jsonl").write_text(JSONL)
    whole = datasets.Dataset.from_list(LINES)
    for split in ("[:25%]", "[25%:75%]", "[15%:]", "[-33%:]", "[:-1]", "[3:-3]"):
        instruction = datasets.ReadInstruction.from_spec(f"train{split}").to_absolute({"train": len(whole)})[0]
        expected = whole.select(range(instruction.from_, instruction.to))["question"]
        assert questions(read(tmp_path / "rows.jsonl", split=split)) == list(expected)


def test_folders(tmp_path: Path) -> None:
    for name, question in (
        ("data/train-00001.jsonl", "t1"), ("data/train-00000.jsonl", "t0"), ("extra.jsonl", "x"), ("test.jsonl", "e"),
        (".cache/hidden.jsonl", "h"),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"query": question, "response": "a"}))
    (tmp_path / "LICENSE.txt").write_text("All rights reserved.")
    records = read(tmp_path)
    assert questions(records) == ["t0", "t1", "x"]
    assert records[0].where == f"{tmp_path}/data/train-00000.jsonl:1"
    assert questions(read(tmp_path, split="test")) == ["e"]
    with pytest.raises(RequestError, match=r"has no split 'tset'. Did you mean: test\? It has: test, train."):
        read(tmp_path, split="tset")


def test_saved_folders(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_list(LINES)
    one.save_to_disk(str(tmp_path / "one"))
    assert questions(read(tmp_path / "one", split="[:20%]")) == ["q0", "q1"]
    datasets.DatasetDict({"train": one, "test": one.select([4])}).save_to_disk(str(tmp_path / "two"))
    assert len(read(tmp_path / "two")) == 10
    records = read(tmp_path / "two", split="test")
    assert questions(records) == ["q4"]
    assert records[0].where == f"{tmp_path / 'two'}[test]: row 1"
    with pytest.raises(RequestError, match=r"has no split 'dev'. It has: train, test."):
        read(tmp_path / "two", split="dev")


def test_hub_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own path, on a folder laid out as a hub repository: load_dataset takes both."""
    import datasets
    from swift_plugin_huggingface.files import parse
    from swift_plugin_huggingface.sources import _hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "train.jsonl").write_text(JSONL)
    (folder / "test.jsonl").write_text(json.dumps(LINES[4]))
    records = [parse(raw) for raw in _hub(str(folder), None, None).read()]
    assert [record.row["question"] for record in records] == [f"q{n}" for n in range(10)]
    assert records[1].where == f"{folder}[train]: row 2"
    assert [parse(raw).row for raw in _hub(str(folder), None, "test").read()] == [LINES[4]]
    with pytest.raises(RequestError, match=r"not had from the hub: .*dev"):
        _hub(str(folder), None, "dev")


def test_the_hub_is_named_when_it_cannot_be_reached() -> None:
    code = (
        "from swift_plugin_huggingface.config import HuggingFaceConfig as C\n"
        "from swift_plugin_huggingface.dataset import open_dataset\n"
        "try: open_dataset(C(path='owner/rows'))\n"
        "except Exception as err: print(type(err).__name__, err)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.stdout.startswith("RequestError dataset 'owner/rows': no such file or folder here, and not had from the hub: ")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.jsnl", "train.jsnl': no such file. Did you mean: train.jsonl?"),
        ("tran.jsonl", "tran.jsonl': no such file. Did you mean: train.jsonl?"),
        ("none/train.jsonl", "none/train.jsonl': no such file, and no folder "),
        ("sheet.xlsx", "sheet.xlsx': cannot tell the form of .xlsx. Known: .jsonl, "),
        ("empty", "empty': the folder holds no data file. Known: .jsonl, "),
    ],
)
def test_what_cannot_be_opened(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "train.jsonl").write_text(JSONL)
    (tmp_path / "sheet.xlsx").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError) as caught:
        open_dataset(HuggingFaceConfig(path=str(tmp_path / name)))
    assert message in str(caught.value)


def test_a_bare_name_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="'identty': no such file or folder, nor an installed data set"):
        open_dataset(HuggingFaceConfig(path="identty"))


def test_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt"):
        (tmp_path / name).write_text("\n" if name != "a.csv" else "")
        assert read(tmp_path / name) == []


def test_columns_are_renamed_and_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "1", "a": "2"}\n{"q": "1", "a": "2", "query": "3"}\n')
    good, bad = read(tmp_path / "rows.jsonl", columns={"q": "query", "a": "response"})
    assert good.row == {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    assert bad.refused == "dataset.columns: 'q' cannot become 'query': the row has that key too"
    swapped = read(tmp_path / "rows.jsonl", columns={"q": "response", "a": "query"}, split="[:1]")
    assert questions(swapped) == ["2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ""}, "option 'path' must be set"),
        ({"split": "train[:x]"}, "split: expected NAME or NAME"),
        ({"columns": {"a": "query", "b": "query"}}, "columns: a, b would all become 'query'"),
        ({"system": " "}, "system: expected a text"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HuggingFaceConfig(**{"path": "x", **options})


def test_text_files_need_no_library(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(JSONL)
    code = (
        "import sys\nfrom swift_plugin_huggingface.config import HuggingFaceConfig as C\n"
        "from swift_plugin_huggingface.dataset import open_dataset\n"
        f"assert len(list(open_dataset(C(path={str(tmp_path / 'rows.jsonl')!r})))) == 10\n"
        "print(sorted({'datasets', 'pyarrow', 'torch', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
