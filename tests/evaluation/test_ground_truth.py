"""Ground truth of the retrieval benchmarks: every way numpy pickles numbers is read, nothing else is run."""

from __future__ import annotations

import collections
import json
import os
import pickle
import sys

import numpy as np
import pytest

from fastdino.evaluation.ground_truth import read_ground_truth

CONTENT = {
    "imlist": ["a", "b", "c", "d"],
    "qimlist": ["q0", "q1"],
    "gnd": [
        {"easy": [1], "hard": [0, 3], "junk": [], "bbx": [1.5, 2.0, 30.0, 40.0]},
        {"easy": [], "hard": [2], "junk": [3]},
    ],
}


def as_arrays(dtype):
    entries = [
        {key: np.array(value, float if key == "bbx" else dtype) for key, value in entry.items()}
        for entry in CONTENT["gnd"]
    ]
    return CONTENT | {"gnd": entries}


def check(truth):
    assert truth.images == CONTENT["imlist"]
    assert [query.name for query in truth.queries] == CONTENT["qimlist"]
    for query, entry in zip(truth.queries, CONTENT["gnd"], strict=True):
        for kind in ("easy", "hard", "junk"):
            values = getattr(query, kind)
            assert values.dtype == np.int64 and values.tolist() == entry[kind]
    assert truth.queries[0].box == (1.5, 2.0, 30.0, 40.0) and truth.queries[1].box is None


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["int64", "uint8", ">i4", "float64"])
def test_pickled_arrays(tmp_path, protocol, dtype):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(as_arrays(dtype), protocol))
    check(read_ground_truth(path))


def test_lists_scalars_and_json(tmp_path):
    scalars = CONTENT | {
        "gnd": [
            {
                key: [np.float32(x) if key == "bbx" else np.int16(x) for x in value]
                for key, value in entry.items()
            }
            for entry in CONTENT["gnd"]
        ]
    }
    for content in (CONTENT, scalars):
        (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(content, 2))
        check(read_ground_truth(tmp_path / "gnd.pkl"))
    (tmp_path / "gnd.json").write_text(json.dumps(CONTENT))
    check(read_ground_truth(tmp_path / "gnd.json"))


def test_two_dimensional_arrays_as_from_matlab(tmp_path):
    content = as_arrays("int64")
    content["gnd"][0]["hard"] = np.asfortranarray([[0, 3]])
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(content))
    check(read_ground_truth(tmp_path / "gnd.pkl"))


def test_python_2_pickles(tmp_path):
    # as Python 2 and its numpy wrote it: text as byte strings, the array's data with bytes above 127
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\ntcnumpy\ndtype\n"
        b"(S'i8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\xc8\\x00\\x00\\x00\\x00\\x00\\x00\\x00'\ntb"
    )
    names = b"(lp0\n" + b"S'im'\na" * 201
    entry = b"(lp1\n(dp2\nS'easy'\n" + array + b"sS'hard'\n(lsS'junk'\n(lsa"
    data = b"(dS'imlist'\n" + names + b"sS'qimlist'\n(lS'q'\nasS'gnd'\n" + entry + b"s."
    (tmp_path / "gnd.pkl").write_bytes(data)
    truth = read_ground_truth(tmp_path / "gnd.pkl")
    assert truth.queries[0].easy.tolist() == [200] and len(truth.images) == 201


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "value, name",
    [
        (Evil(exec, "import sys; sys.ran_from_pickle = True"), "builtins.exec|__builtin__.exec"),
        (Evil(os.system, "exit 1"), "posix.system|nt.system"),
        (Evil(bytes, 10**12), "takes 0 positional arguments|builtins.bytes"),
        (collections.OrderedDict(a=1), "collections.OrderedDict"),
        (np.array([Evil(exec, "sys.ran_from_pickle = True")], object), "dtype 'O8'"),
        (np.zeros(2, [("x", "i4")]), "dtype 'V4'"),
        (np.array(["a"]), "dtype 'U1'"),
        (np.dtype("datetime64[s]"), "dtype 'M8'"),
    ],
)
def test_everything_else_is_refused_by_name(tmp_path, protocol, value, name):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps({**CONTENT, "more": value}, protocol))
    with pytest.raises(ValueError, match=f"gnd.pkl: .*({name})"):
        read_ground_truth(path)
    assert not hasattr(sys, "ran_from_pickle")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", ""),
        (b"not a pickle", ""),
        (pickle.dumps(as_arrays("int64"))[:-20], ""),
        (b"(lp0\ng0\na.", "got list"),
        # changes a function
        (b"cnumpy\nndarray\n}S'x'\nI1\nsb.", "state of an array"),
        # claims more numbers than there are
        (
            b"cnumpy.core.multiarray\n_reconstruct\n)R(I1\n(I1000000000\ntcnumpy\ndtype\n(S'i8'\ntRI00\nS'abc'\ntb.",
            "expected 1000000000 numbers, got 3 bytes",
        ),
        # fields with names
        (b"cnumpy\ndtype\n(S'i8'\ntR(I3\nS'<'\nN(S'x'\nt}I-1\nI-1\nI0\ntb.", "structured"),
        (b"c_codecs\nencode\n(S'abc'\nS'zip'\ntR.", "expected bytes"),
    ],
)
def test_damaged_pickles(tmp_path, data, message):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"gnd.pkl: .*{message}"):
        read_ground_truth(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"imlist": []}, "imlist"),
        ({"qimlist": ["a", 3]}, "qimlist"),
        ({"gnd": [{}]}, "gnd.*2 entries.*1 entries"),
        ({"gnd": [{"junk": [1]}] * 2}, r"gnd\[0\].*easy, hard"),
        ({"gnd": [{"easy": [0]}, {"easy": [4]}]}, r"gnd\[1\]\['easy'\].*0 to 3"),
        ({"gnd": [{"easy": [0]}, {"easy": [0.5]}]}, r"gnd\[1\]\['easy'\].*0 to 3"),
        ({"gnd": [{"easy": [0]}, {"easy": {}}]}, r"gnd\[1\]\['easy'\].*numbers"),
        ({"gnd": [{"easy": [0], "bbx": [1, 2, 3]}] * 2}, r"gnd\[0\]\['bbx'\]"),
        ({"gnd": [{"easy": [0], "bbx": [5, 2, 3, 9]}] * 2}, r"gnd\[0\]\['bbx'\]"),
    ],
)
def test_wrong_content_is_named(tmp_path, change, message):
    path = tmp_path / "gnd.json"
    path.write_text(json.dumps(CONTENT | change))
    with pytest.raises(ValueError, match=f"gnd.json: {message}"):
        read_ground_truth(path)


def test_files_that_are_no_ground_truth(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pkl"):
        read_ground_truth(tmp_path / "absent.pkl")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="imlist, qimlist, gnd, got list"):
        read_ground_truth(tmp_path / "list.json")
