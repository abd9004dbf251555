import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import columns
from pipeline.errors import PipelineError
from pipeline.readers import read_file, read_files


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def write_jsonl(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def message(path, **options):
    with pytest.raises(PipelineError) as caught:
        read_file(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_jsonl_keeps_types_and_lines(tmp_path):
    first = '\ufeff{"tokens": ["a", "b"], "n": 1, "x": 0.5, "ok": true}\n'
    text = first + '\n{"tokens": [], "n": null, "x": 2, "ok": false}\r\n'
    rows = read_file(write(tmp_path / "train.jsonl", text))
    assert rows.table.to_pylist() == [
        {"tokens": ["a", "b"], "n": 1, "x": 0.5, "ok": True},
        {"tokens": [], "n": None, "x": 2.0, "ok": False},
    ]
    assert [rows.where(0), rows.where(1)] == ["train.jsonl:1", "train.jsonl:3"]


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path):
    rows = read_file(write(tmp_path / "a.jsonl", '{"text": "one\u2028two\x85three"}\n{"text": "b"}\n'))
    assert rows.table["text"].to_pylist() == ["one\u2028two\x85three", "b"]
    assert rows.where(1) == "a.jsonl:2"


def test_types_meet_over_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "CHUNK_ROWS", 2)
    source = [{"a": None, "b": 1, "c": []}] * 2 + [{"a": "x", "b": 0.5, "c": ["y"]}] * 3
    rows = read_file(write_jsonl(tmp_path / "a.jsonl", source))
    assert rows.table.to_pylist() == source
    assert [str(t) for t in rows.table.schema.types] == ["string", "double", "list<item: string>"]


def test_objects_are_kept_as_json(tmp_path):
    rows = read_file(
        write_jsonl(tmp_path / "a.jsonl", [{"text": "t", "meta": {"k": [1]}}, {"text": "u", "meta": None}])
    )
    assert rows.table["meta"].to_pylist() == ['{"k": [1]}', None]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ('{"text": "b"', "a.jsonl:2: not JSON"),
        ('["b"]', "a.jsonl:2: list where an object should be"),
        ('{"text": 5}', "a.jsonl:2: column 'text': an integer where the rows before have a string"),
        ('{"text": ["b"]}', "a.jsonl:2: column 'text': a list of strings where"),
        ('{"text": ["b", 1]}', "a.jsonl:2: column 'text': not one type"),
        ('{"text": "\\ud800"}', "a.jsonl:2: column 'text': not one type"),
        ('{"txt": "b"}', "a.jsonl:2: column 'text' is missing"),
        ('{"text": "b", "more": 1}', "a.jsonl:2: column 'more' is in no row before"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 100])
def test_a_bad_jsonl_row_is_named(tmp_path, monkeypatch, second, said, chunk):
    monkeypatch.setattr(columns, "CHUNK_ROWS", chunk)
    assert message(write(tmp_path / "a.jsonl", '{"text": "a"}\n' + second + "\n")).startswith(said)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.conll", "a.parquet"])
def test_an_empty_or_unreadable_file_is_named(tmp_path, name):
    assert "cannot be read" in message(tmp_path / name)
    said = message(write(tmp_path / name, ""))
    assert ("not a parquet file" if name == "a.parquet" else "no rows") in said


def test_a_header_alone_is_no_row(tmp_path):
    assert "no rows" in message(write(tmp_path / "a.csv", "text,label\n"))


def test_an_unknown_ending_lists_the_known(tmp_path):
    assert ".jsonl" in message(write(tmp_path / "a.xml", "<a/>"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.conll"])
def test_bytes_that_are_not_utf8_are_named(tmp_path, name):
    good = '{"text": "a"}' if name == "a.jsonl" else "a\tb"
    assert message(write(tmp_path / name, good.encode() + b"\ncaf\xe9\n")).startswith(
        f"{name}:2: byte 0xe9"
    )


def test_csv_columns_get_types_only_if_every_cell_has_it(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "n", "x", "mixed", "tags", "bracket"])
        writer.writerow(["1", "1", "0.5", "1", '["O", "B-a"]', "[x] y"])
        writer.writerow(["two\nlines, a comma", "", "2", "b", "", "[z]"])
        writer.writerow(["3", "-7", "1e3", "", "[]", "[]"])
    rows = read_file(tmp_path / "a.csv", keep_text={"text"})
    assert rows.table.to_pydict() == {
        "text": ["1", "two\nlines, a comma", "3"],
        "n": [1, None, -7],
        "x": [0.5, 2.0, 1000.0],
        "mixed": ["1", "b", None],
        "tags": [["O", "B-a"], None, []],
        "bracket": ["[x] y", "[z]", "[]"],
    }
    assert [rows.where(k) for k in range(3)] == ["a.csv:2", "a.csv:3", "a.csv:5"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text,label\na,b\nc\n", "a.csv:3: 1 cells where the header has 2"),
        ('text\na\n"open\n', "a.csv:3: not a csv record"),
        ("text,text\na,b\n", "a.csv:1: a column name is empty or there twice"),
        ('text,tags\na,"[""O""]"\nb,[O]\n', "a.csv:3: column 'tags': not a JSON list"),
    ],
)
def test_a_bad_csv_row_is_named(tmp_path, text, said):
    assert message(write(tmp_path / "a.csv", text)).startswith(said)


def test_a_long_csv_cell_is_read(tmp_path):
    rows = read_file(write(tmp_path / "a.csv", "text,label\n" + "long " * 50_000 + ",x\n"))
    assert len(rows.table["text"][0].as_py()) == 250_000


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_tsv_as_a_csv_writer_quotes_it(tmp_path, quoting):
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=quoting)
        writer.writerows([["text", "tags"], ['she said "no"', '["O", "O"]'], ["b", '["O"]']])
    table = read_file(tmp_path / "a.tsv").table
    assert table.to_pydict() == {"text": ['she said "no"', "b"], "tags": [["O", "O"], ["O"]]}


def test_a_quote_in_a_tsv_cell_is_a_character(tmp_path):
    table = read_file(write(tmp_path / "a.tsv", 'text\tlabel\n"open\t1\n"so be it"\t0\n')).table
    assert table.to_pydict() == {"text": ['"open', '"so be it"'], "label": [1, 0]}


def test_parquet_gets_plain_types_and_class_names(tmp_path):
    features = {
        "label": {"names": ["no", "yes"], "_type": "ClassLabel"},
        "tags": {"feature": {"names": ["O", "B-x"], "_type": "ClassLabel"}, "_type": "List"},
    }
    table = pa.table(
        {
            "tokens": pa.array([["a"]], pa.large_list(pa.large_string())),
            "kind": pa.array(["x"]).dictionary_encode(),
            "label": [1],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read_file(tmp_path / "a.parquet")
    assert [str(t) for t in rows.table.schema.types] == ["list<item: string>", "string", "int64"]
    assert rows.class_names == {"label": ("no", "yes"), "tags": ("O", "B-x")}
    assert rows.where(0) == "a.parquet:row 1"


CONLL = """-DOCSTART- -X- -X- O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC
call NN I-NP I-MISC

# a comment
Peter NNP I-NP I-PER
Blackburn NNP I-NP B-PER


"""


def test_conll_2003_columns_and_iob1(tmp_path):
    rows = read_file(write(tmp_path / "train.txt", CONLL))
    assert rows.table.to_pylist() == [
        {
            "tokens": ["EU", "rejects", "German", "call"],
            "pos": ["NNP", "VBZ", "JJ", "NN"],
            "chunk": ["B-NP", "B-VP", "B-NP", "I-NP"],
            "tags": ["B-ORG", "O", "B-MISC", "I-MISC"],
        },
        {
            "tokens": ["Peter", "Blackburn"],
            "pos": ["NNP", "NNP"],
            "chunk": ["B-NP", "I-NP"],
            "tags": ["B-PER", "B-PER"],
        },
    ]
    assert [rows.where(0), rows.where(1)] == ["train.txt:3", "train.txt:9"]


def test_iob1_over_chunks_equals_a_plain_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "CHUNK_ROWS", 3)
    rng = np.random.default_rng(0)
    sentences = [list(rng.choice(["O", "I-a", "I-b", "B-a"], size=rng.integers(1, 7))) for _ in range(50)]
    text = "\n\n".join("\n".join(f"w\t{tag}" for tag in tags) for tags in sentences)

    def plain_loop(tags):
        new, before = [], "O"
        for tag in tags:
            new.append("B" + tag[1:] if tag[0] == "I" and before[2:] != tag[2:] else tag)
            before = tag
        return new

    table = read_file(write(tmp_path / "a.iob", text)).table
    assert table["tags"].to_pylist() == [plain_loop(tags) for tags in sentences]


def test_tags_that_are_not_iob_stay(tmp_path):
    table = read_file(write(tmp_path / "a.conll", "a DET\nb I-x\n")).table
    assert table["tags"].to_pylist() == [["DET", "I-x"]]


def test_words_that_start_with_a_number_sign_are_words(tmp_path):
    table = read_file(write(tmp_path / "a.bio", "# text = x\n#tag\tB-x\n#\tO\n\n# newdoc\n#\tO\n")).table
    assert table["tokens"].to_pylist() == [["#tag", "#"], ["#"]]


def test_other_columns_are_numbered_and_one_column_has_no_tags(tmp_path):
    table = read_file(write(tmp_path / "a.conll", "a x O\nb y O\n")).table
    assert table.column_names == ["tokens", "column_2", "tags"]
    assert read_file(write(tmp_path / "b.conll", "a\nb\n")).table.column_names == ["tokens"]


@pytest.mark.parametrize(("text", "line"), [("a O\nb\n", 2), ("a\tO\nb\t\n", 2), ("a O\n\nb x O\n", 3)])
def test_a_ragged_conll_row_is_named(tmp_path, text, line):
    assert message(write(tmp_path / "a.conll", text)).startswith(f"a.conll:{line}: ")


def files(folder, **contents):
    paths = {}
    for split, text in contents.items():
        paths[split] = folder / f"{split}.csv"
        paths[split].write_text(text, encoding="utf-8")
    return {split: rows.table for split, rows in read_files(paths, keep_text=["text"]).items()}


def test_what_is_text_in_one_file_is_text_in_all(tmp_path):
    found = files(
        tmp_path,
        train="text,label\n1,a\n2,\n",
        dev="text,label\n3,1.50\n4,\n",
        test="text,label\n5,\n6,\n",
    )
    assert found["train"]["label"].to_pylist() == ["a", None]
    assert found["dev"]["label"].to_pylist() == ["1.50", None]
    assert found["test"]["label"].to_pylist() == [None, None]
    assert found["dev"]["text"].to_pylist() == ["3", "4"]


def test_integers_beside_floats_are_floats_and_empty_columns_take_the_others_type(tmp_path):
    found = files(
        tmp_path, train="text,score\na,1\nb,2\n", dev="text,score\nc,0.5\n", test="text,score\nd,\n"
    )
    assert [table["score"].to_pylist() for table in found.values()] == [[1.0, 2.0], [0.5], [None]]
    assert len({table["score"].type for table in found.values()}) == 1


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_blank_lines_of_one_column_are_empty_cells(tmp_path, ending):
    path = tmp_path / f"train{ending}"
    path.write_text("\ntext\none\n\n\ntwo\n\n", encoding="utf-8")
    rows = read_file(path, keep_text=["text"])
    assert rows.table["text"].to_pylist() == ["one", "", "", "two"]
    assert rows.lines.tolist() == [3, 4, 5, 6]
    path.write_text("a,b\n1,2\n\n3,4\n".replace(",", "\t" if ending == ".tsv" else ","), encoding="utf-8")
    assert read_file(path).table["a"].to_pylist() == [1, 3]
