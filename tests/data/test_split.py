"""Which records and bytes are held out."""

import resource

import numpy as np
import pytest
from helpers import numbered, prepare, prepared_folder, write_jsonl

import train_mlx
from bdh_lib.data import prepare as preparing
from bdh_lib.data.formats import FIELDS
from bdh_lib.data.prepare import load_unsplit
from bdh_lib.data.split import bytes_to_evaluate, choose_validation, record_ends
from bdh_lib.training import dataset
from bdh_mlx import UserError
from train_mlx import format_example


def test_identical_texts_go_to_one_side(tmp_path):
    records = numbered(10) * 20
    report, train, val = prepare(write_jsonl(tmp_path / "d.jsonl", records), tmp_path / "cache")
    assert report["val"]["records"] == 20
    assert len({*val.split(b"\n---\n\n")} - {b""}) == 1
    assert val.split(b"Greet. ")[1][:1] not in [p[:1] for p in train.split(b"Greet. ")[1:]]


def test_the_split_follows_the_seed(tmp_path):
    source = write_jsonl(tmp_path / "d.jsonl", numbered(50))
    one, again, other = (
        prepare(source, tmp_path / str(i), seed=seed)[2] for i, seed in enumerate((1, 1, 2))
    )
    assert one == again != other


def many(systems, records, seed=0):
    """Records of few systems and some repeated instructions, as instruction data sets have them."""
    rng = np.random.default_rng(seed)
    system, instruction, response = (rng.integers(n, size=records) for n in (systems, 300, 2))
    return [
        {"system": f"System {s}.", "instruction": f"Do {i}.", "response": f"Done {r}."}
        for s, i, r in zip(system, instruction, response, strict=True)
    ]


def side_texts(file, cache, mode, share=0.1):
    """The texts of each side in a mode, as sets."""
    _, *sides = prepare(file, cache, mode=mode, val_fraction=share)
    joint = "\n\n### System" if mode in ("both", "full") else "\n\n"
    return [
        {
            t.removeprefix("### System").removeprefix(":")
            for t in s.removesuffix("\n\n").split(joint)
        }
        for s in map(bytes.decode, sides)
    ]


@pytest.mark.parametrize("systems", [1, 3, 40, 100])
def test_a_record_held_out_in_one_mode_trains_in_none(tmp_path, systems):
    records = many(systems, 400)
    file = write_jsonl(tmp_path / "d.jsonl", [*records, {"instruction": "Lone."}])
    modes = ["instruction", "both", "full"] + (["system"] if systems > 3 else [])
    sides = {mode: side_texts(file, tmp_path / "cache", mode) for mode in modes}
    text = lambda r, mode: format_example(r, mode).removeprefix("### System:")  # noqa: E731
    trained = [r for r in records if text(r, "full") in sides["full"][0]]
    held_out = [r for r in records if text(r, "full") in sides["full"][1]]
    assert held_out and not [r for r in held_out if r in trained]
    for mode, (train, val) in sides.items():
        assert val and not train & val, mode
        assert val <= {text(r, mode) for r in held_out} | {"Lone."}  # by record, the same ones
        assert not val & {text(r, mode) for r in trained}  # nor as a section in another mode


def test_the_split_holds_out_its_share_and_whole_systems_where_they_fit(tmp_path):
    records = many(40, 1000)
    records = [r for i, r in enumerate(records) if r not in records[:i]]
    file = write_jsonl(tmp_path / "d.jsonl", records)
    report, *_ = prepare(file, tmp_path / "cache")
    assert report["val"]["records"] == round(0.1 * len(records)) and report["shared"] == 0
    train, val = side_texts(file, tmp_path / "cache", "system")
    assert val and len(train) + len(val) == 40


def test_half_of_the_share_is_drawn_by_whole_system_texts():
    sizes = [*[10] * 50, 500]  # a text of half of the records never fits
    system = np.repeat(np.arange(1, 52), sizes)
    keys = np.stack([system, np.zeros_like(system), np.arange(1, 1001)]).astype(np.uint64)
    for seed in range(20):
        in_val = choose_validation(keys, 0.1, seed)
        whole = [np.all(in_val[system == text]) for text in range(1, 52)]
        assert in_val.sum() == 100 and sum(whole) == 5 and not whole[-1], seed


def test_few_records_with_a_system_text_are_not_all_held_out(tmp_path):
    """In data of which most is plain text or has no system text."""
    few = numbered(40, system="Rule")
    text = [{"text": f"Line {i}"} for i in range(2000)]
    asked = [{"instruction": f"q{i}", "response": f"a{i}"} for i in range(2000)]
    for others, mode in ((text, "full"), (asked, "both"), (text + asked, "system")):
        file = write_jsonl(tmp_path / "d.jsonl", others + few)
        _, train, val = prepare(file, tmp_path / "cache", mode=mode)
        assert 25 <= train.count(b"Rule") < 40 and train.count(b"Rule") + val.count(b"Rule") == 40


def test_a_mode_whose_texts_cannot_be_held_out_says_so(tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", many(3, 400))
    with pytest.raises(
        UserError, match=r"3 distinct texts in TRAINING_MODE 'system'.*VAL_FRACTION"
    ):
        prepare(file, tmp_path / "cache", mode="system")


def test_an_evaluation_reads_whole_records_of_all_files_in_a_seeded_order(tmp_path):
    for name in "abc":
        answers = [r | {"response": f"{name} {i}" * 9} for i, r in enumerate(numbered(200))]
        write_jsonl(tmp_path / f"{name}.jsonl", [r | {"system": f"{name}{i}"}
                                                 for i, r in enumerate(answers)])  # fmt: skip
    orders = []
    for cache, seed in (("one", 1), ("again", 1), ("other", 2)):
        folder = prepared_folder(tmp_path, tmp_path / cache / ".data", "full", 0.3, seed)
        val = (folder / "val.bin").read_bytes()
        read = bytes_to_evaluate(record_ends(folder, "val"), len(val) // 2)
        *records, rest = val[:read].split(b"\n---\n\n")
        assert 0.48 * len(val) < read <= len(val) // 2 and not rest  # the last one is whole, too
        assert val[read:].startswith(b"### System:\n")
        files = [record.split(b"### Response:\n")[1][:1] for record in records]
        assert all(20 < files.count(name) < 40 for name in (b"a", b"b", b"c"))
        fields = np.fromfile(folder / "val.fields", np.uint8)
        assert bytes(np.frombuffer(val, np.uint8)[fields == 2]).startswith(b"Greet. ")
        assert val.count(b"Greet. ") * len(b"Greet. ") <= np.count_nonzero(fields == 2)
        orders.append(records)
        for limit, expected in ((2, 1), (len(records[0]) + 6, 1), (len(val), 180), (10**9, 180)):
            read = bytes_to_evaluate(record_ends(folder, "val"), limit)
            assert val[:read].count(b"\n---\n\n") == expected  # at least one, whole
            assert val[:read].endswith(b"\n---\n\n")
        assert bytes_to_evaluate(record_ends(folder, "val"), None) is None
        train = (folder / "train.bin").read_bytes()
        result = [response[:1] for response in train.split(b"### Response:\n")[1:]]
        assert result == sorted(result)  # training stays in the order of the data
    assert orders[0] == orders[1] != orders[2]
    (folder / "val_ends.npy").write_bytes(b"damaged")
    assert not preparing.is_intact(folder)


def test_a_training_side_without_what_loss_on_counts_is_refused(tmp_path):
    (split := tmp_path / "split").mkdir()
    for side, fields in (("train", b"\1"), ("val", b"\1\3")):
        (split / f"{side}.bin").write_bytes(b"x" * 9000)
        (split / f"{side}.fields").write_bytes((fields * 9000)[:9000])
    args = ["--dataset", str(split), "--checkpoint-dir", str(tmp_path / "ck")]
    s = train_mlx.read_settings([*args, "--training-mode", "full", "--loss-on", "response"])
    with pytest.raises(UserError, match="9,000 training bytes have none of it; take other data"):
        dataset.open_run_data(s)
    (split / "train.fields").write_bytes(b"\1" * 8999 + b"\3")
    _, train, val = dataset.open_run_data(s)
    assert len(train.bytes) == len(val.bytes) == 9000  # a ready split is in no other order
    (split / "val.fields").write_bytes(b"\1" * 9000)
    with pytest.raises(UserError, match="validation bytes read have none of it; raise EVAL_BYTES"):
        dataset.open_run_data(s)


def test_a_ready_split_is_taken_as_it_is(tmp_path):
    (source := tmp_path / "split").mkdir()
    (source / "train.bin").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="no val"):
        prepare(source, tmp_path / "cache")
    (source / "val.bin").write_bytes(b"held out")
    report, train, val = prepare(source, tmp_path / "cache")
    assert (train, val) == (bytes(range(256)), b"held out")
    assert (report["train"]["bytes"], report["val"]["bytes"]) == (256, 8)
    (source / "val.fields").write_bytes(b"\1\1\1\1\2\2\2\2")
    folder = prepared_folder(source, tmp_path / "cache", "full", 0.1, 1)
    assert (folder / "val.fields").read_bytes() == b"\1\1\1\1\2\2\2\2"
    assert (folder / "train.fields").read_bytes() == bytes([FIELDS.index("text")]) * 256
    assert preparing.is_intact(folder)
    report, stream, fields = load_unsplit(str(source), "full", tmp_path)  # for an evaluation
    assert (report["records"], stream.tobytes()) == (None, b"held out")
    assert fields[3:5].tolist() == [1, 2]
    (source / "val.fields").write_bytes(b"\1")
    with pytest.raises(UserError, match="a byte for each"):
        prepare(source, tmp_path / "cache")


@pytest.mark.parametrize("limit", [100, 3000, 9000])
def test_a_disk_that_fills_while_data_are_prepared_leaves_nothing(tmp_path, limit):
    source = write_jsonl(tmp_path / "d.jsonl", numbered(200))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(UserError, match="cache cannot be written: File too large"):
            prepare(source, tmp_path / "cache")
        with pytest.raises(UserError, match="way cannot be written: File too large"):
            (tmp_path / "way").mkdir()
            load_unsplit(str(source), "full", tmp_path / "way")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [f.name for f in (tmp_path / "cache").iterdir()] == [".lock"]
    assert prepare(source, tmp_path / "cache")[0]["records"] == 200
