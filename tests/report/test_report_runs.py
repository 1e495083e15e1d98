import json
import os
import struct
import zlib
from pathlib import Path

import pytest
from run_directories import png, write_run

from hybridvit.report.runs import (
    MAX_PICTURE,
    MAX_RECORD,
    find_runs,
    read_picture,
    read_run,
    read_yaml,
)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_reads_what_the_engine_wrote(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, "conv", "mae", 3, {"test/knn": 0.5}))
    assert (run.name, run.seed, run.kind, run.status) == ("conv-mae", 3, "train", "complete")
    assert run.results == {"test/knn": 0.5}
    assert (run.tokens, run.patch_px, run.parameters, run.flops) == (16, 4, 1234567, 2345000000)
    assert run.is_patch_local is False
    assert run.objective == "mae"
    assert (run.images, run.train_seconds, run.images_per_second) == (5000, 12.5, 403.0)


def test_metrics_tolerate_repeats_and_a_cut(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    lines = [
        '{"step": 10, "epoch": 0.5, "train/loss": 2.0}',
        '{"step": 20, "epoch": 1.0, "train/loss": 1.5, "train/acc',  # cut, then resumed
        '{"step": 10, "train/loss": 1.9, "train/nan": NaN}',
        '{"step": 20, "train/loss": 1.0}',
        '{"step": 20, "val/accuracy": 0.4, "note": "text", "flag": true}',
        "[1, 2]",
        '{"no": "step"}',
        '{"step": 30, "train/lo',
    ]
    (path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_run(path).metrics == (
        {"step": 10, "epoch": 0.5, "train/loss": 1.9},
        {"step": 20, "train/loss": 1.0, "val/accuracy": 0.4},
    )


@pytest.mark.parametrize(
    ("lines", "note"),
    [
        (['{"step": 1}', '{"step": 2, "tr'], None),  # cut off at the end
        (['{"step": 1}', '{"step": 2, "tr{"step": 1}', '{"step": 2}'], None),  # and gone on
        (['{"step": 1}', "", '{"step": 2}'], None),
        (['{"step": 1}', "x", "[1]", '{"no": "step"}', '{"step": 2}'], "3 of 5 lines"),
        (["\0\0"], "1 of 1 lines"),
        ([], None),
    ],
)
def test_damaged_metrics_are_told(tmp_path: Path, lines: list[str], note: str | None) -> None:
    path = write_run(tmp_path)
    (path / "metrics.jsonl").write_text("\n".join(lines))
    expected = (f"{note} of {path / 'metrics.jsonl'} cannot be read",) if note else ()
    assert read_run(path).notes == expected


def test_a_run_without_metrics_is_read(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    (path / "metrics.jsonl").unlink()
    assert read_run(path).metrics == ()


def test_results_that_are_no_shares_are_no_results(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    (path / "summary.json").write_text(
        '{"schema": 1, "results": {"a": NaN, "b": "0.5", "c": true, "d": 1e999, "e": 1, "f": 1e308,'
        '"g": -0.5}}'
    )
    run = read_run(path)
    assert run.results == {"e": 1.0}
    assert run.notes[-1].endswith("no shares of images, left out: a, b, c, d, f, g")


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("run.json", "", r"run.json is broken JSON \(Expecting value: line 1"),
        ("run.json", '{"schema": 1,', "run.json is broken JSON"),
        ("run.json", "[]", "holds no JSON object"),
        (
            "run.json",
            '{"schema": 2}',
            "has schema 2, newer than the 1 known here; update hybridvit",
        ),
        ("run.json", '{"name": "x"}', "has no schema version"),
        ("run.json", '{"schema": true}', "has no schema version"),
        ("run.json", "[" * 100_000, "nested too deeply"),
        ("run.json", '{"schema": ' + "9" * 5000 + "}", "broken JSON"),
        ("run.json", '{"schema": 1, "name": 3}', "name is '3', expected str"),
        ("summary.json", "{", "summary.json is broken JSON"),
        ("summary.json", '{"schema": 7}', "schema 7, newer"),
        ("config.yaml", "a: [1", "config.yaml is no plain YAML"),
        ("config.yaml", "- 1", "holds no mapping"),
        ("config.yaml", "a: !!python/object/apply:os.system ['true']", "no plain YAML"),
        ("config.yaml", "a: &x [1]\nb: *x", r"aliases \(\*name\) are not allowed"),
        ("config.yaml", "a: " + "[" * 100_000, "no plain YAML"),
        ("config.yaml", "a: " + "x" * MAX_RECORD, "larger than 1 MiB"),
    ],
)
def test_broken_files_are_one_clear_line(
    tmp_path: Path, name: str, content: str, text: str
) -> None:
    path = write_run(tmp_path)
    (path / name).write_text(content)
    with pytest.raises(ValueError, match=text) as caught:
        read_run(path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    (path / "run.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        read_run(path)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("status", "done", "status is 'done', not one of complete, running"),
        ("kind", "other", "kind is 'other', not one of train, pixels"),
        ("seed", "0", "seed is '0', expected int"),
        ("seed", True, "seed is 'True', expected int"),
        ("arm", [1], "arm is no mapping"),
    ],
)
def test_wrong_values(tmp_path: Path, key: str, value: object, text: str) -> None:
    path = write_run(tmp_path)
    edit(path / "run.json", **{key: value})
    with pytest.raises(ValueError, match=text):
        read_run(path)


def test_directories_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run directory: it has no run\.json"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="is no directory"):
        read_run(tmp_path / "missing")
    with pytest.raises(ValueError, match="does not exist"):
        find_runs([tmp_path / "missing"])
    with pytest.raises(ValueError, match="holds no run"):
        find_runs([tmp_path])


def test_complete_without_summary(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    (path / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"complete but has no summary\.json"):
        read_run(path)


def test_links_out_of_the_directory_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"schema": 1, "results": {"test/accuracy": 1}}')
    path = write_run(tmp_path / "runs", figure=png())
    (path / "summary.json").unlink()
    (path / "summary.json").symlink_to(secret)
    with pytest.raises(ValueError, match="is it a link"):
        read_run(path)
    (tmp_path / "private.png").write_bytes(png())
    other = write_run(tmp_path / "runs", seed=1)
    (other / "figures" / "reconstructions-step-1.png").symlink_to(tmp_path / "private.png")
    assert read_picture(read_run(other)) is None


def test_texts_are_stripped_of_control_characters(tmp_path: Path) -> None:
    path = write_run(
        tmp_path,
        record={"name": "a\x1b[31mb\u202ec\nd\ud800", "arm": {"x\x00": "y\x07"}},
        config={"optim": {"note": "p\x1bq"}},
    )
    run = read_run(path)
    assert run.name == "a\ufffd[31mb\ufffdc d\ufffd"
    assert run.arm == {"x\ufffd": "y\ufffd"}
    assert run.config["optim"]["note"] == "p\ufffdq"


def test_find_runs_looks_below_and_counts_a_hash_once(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", seed=0, results={"test/accuracy": 0.5})
    write_run(tmp_path / "b" / "c" / "d", seed=1)
    write_run(tmp_path / "z", seed=0, results={"test/accuracy": 0.6})  # the same experiment
    (tmp_path / "loop").symlink_to(tmp_path)
    runs = find_runs([tmp_path, first])
    assert [(r.seed, r.results) for r in runs] == [(0, {"test/accuracy": 0.5}), (1, {})]
    assert len(runs[0].notes) == 1
    assert "the same experiment" in runs[0].notes[0]


def test_a_pixel_baseline_may_share_the_hash_of_a_trained_run(tmp_path: Path) -> None:
    write_run(tmp_path, record={"hash": "deadbeef"}, folder="a")
    write_run(tmp_path, record={"hash": "deadbeef", "kind": "pixels"}, folder="b")
    assert [r.kind for r in find_runs([tmp_path])] == ["train", "pixels"]


def test_find_runs_prefers_the_complete_run(tmp_path: Path) -> None:
    write_run(tmp_path / "a", record={"status": "stopped"})
    complete = write_run(tmp_path / "b")
    assert [r.path for r in find_runs([tmp_path])] == [complete]


def test_find_runs_does_not_look_forever(tmp_path: Path) -> None:
    write_run(tmp_path / "1" / "2" / "3" / "4" / "5")
    with pytest.raises(ValueError, match="up to 4 folders below"):
        find_runs([tmp_path])


def test_the_latest_sound_picture(tmp_path: Path) -> None:
    path = write_run(tmp_path, figure=png())
    folder = path / "figures"
    late = folder / "reconstructions-step-1000.png"
    late.write_bytes(png(8, 8))
    (folder / "reconstructions-step-2000.png").write_bytes(b"<svg onload='x()'>")
    (folder / "reconstructions-step-3000.png").write_bytes(png() + bytes(MAX_PICTURE))
    (folder / "reconstructions-step-4000.png").write_bytes(png()[:16] + b"\xff" * 8 + png()[24:])
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "reconstructions-step-5000.png")  # opening it would wait forever
    assert read_picture(read_run(path)) == (late, png(8, 8), "not named")


def text_chunk(key: bytes, text: bytes) -> bytes:
    body = b"tEXt" + key + b"\0" + text
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize(
    ("chunks", "rows"),
    [
        (text_chunk(b"a", b"x") + text_chunk(b"rows", b"seen, said"), "seen, said"),
        (text_chunk(b"rows", b"\x1b[31m<b>\xe9"), "\ufffd[31m<b>\xe9"),
        (text_chunk(b"rows", b"x" * 5000), "x" * 200),
        (b"\xff\xff\xff\xfftEXtrows\0cut", None),
        (text_chunk(b"row", b"x"), "not named"),
    ],
)  # fmt: skip
def test_a_picture_names_its_rows(tmp_path: Path, chunks: bytes, rows: str | None) -> None:
    plain = png()
    path = write_run(tmp_path, figure=plain[:33] + chunks + plain[33:])  # after the header
    found = read_picture(read_run(path))
    assert found is not None
    assert rows is None or found[2] == rows
    assert len(found[2]) <= 200


@pytest.mark.parametrize("name", ["config.yaml", "study.yaml"])
def test_yaml_of_any_depth_is_refused_not_crashed_on(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a: " + "- " * 100_000)
    with pytest.raises(ValueError, match="no plain YAML"):
        read_yaml(tmp_path, name)
    (tmp_path / name).write_text("{" * 65 + "}" * 65)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_yaml(tmp_path, name)
