"""The runner with a model that is not one: batches, resume, broken images, cost, summary."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from vlmattn.errors import DataError, SpecError, UnknownMethodError
from vlmattn.eval import bench as benches
from vlmattn.eval import runner, summary
from vlmattn.eval.benchmarks import pope, scenes
from vlmattn.eval.items import Item
from vlmattn.eval.records import RunFolder, read_records

IDENTITY = {"spec": "none"}


class Fake:
    """Says yes to even widths; counts calls; can stop in the middle like a killed process."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.calls: list[int] = []
        self.stop_after = stop_after

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Any:
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(len(prompts))
        cost = {
            "prompt_tokens": 20,
            "visual_tokens": 16,
            "visual_per_layer": [16, 16, 4, 4],
            "kv_bytes": 50.0,
            "kv_bytes_full": 100.0,
            "prefill_macs": 30.0,
            "prefill_macs_full": 60.0,
        }
        times = {"prefill_ms": 10.0 * len(self.calls), "decode_ms": 6.0, "new_tokens": 3}
        texts = ["Yes" if image.width % 2 == 0 else "No" for image in images]
        return SimpleNamespace(texts=texts, costs=[cost] * len(texts), times=times)


def pope_folder(folder: Path, images: int = 4) -> Path:
    (folder / "images").mkdir(parents=True)
    for number in range(images):
        Image.new("RGB", (20 + number, 20)).save(folder / "images" / f"{number}.png")
    for category in pope.CATEGORIES:
        rows = [
            {"question_id": n, "image": f"{n % images}.png", "text": "Is there a dog in the image?", "label": label}
            for n in range(2 * images)
            for label in [("yes", "no")[n % 2]]
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"coco_pope_{category}.json").write_text(text)
    return folder


def original(folder: Path, **options: Any) -> Any:
    return benches.load("pope", embedded=False, data=folder, **options)


def run(bench: Any, folder: Path, ask: Any, batch_size: int = 5) -> list[dict]:
    with RunFolder(folder, IDENTITY) as out:
        runner.run_items(bench, bench.items, ask, out, batch_size)
    return read_records(folder)


def test_a_run_records_raw_text_prompt_and_cost(tmp_path: Path) -> None:
    bench, told = original(pope_folder(tmp_path / "data")), []
    with RunFolder(tmp_path / "run", IDENTITY) as out:
        runner.run_items(bench, bench.items, Fake(), out, 5, lambda *step: told.append(step))
    records = read_records(tmp_path / "run")
    assert [record["id"] for record in records] == [item.id for item in bench.items]
    assert told[0] == ("none", 0, 24) and told[-1] == ("none", 24, 24)
    assert records[0]["prompt"] == "Is there a dog in the image?\nAnswer the question using a single word or phrase."
    score = bench.score(bench.items, [(record["id"], record["text"]) for record in records], ())
    assert score["mean_accuracy"] == score["mean_f1"] == 1.0
    assert bench.intervals(bench.items, [(record["id"], record["text"]) for record in records])["mean_accuracy"] == (
        1.0,
        1.0,
    )


def test_an_interrupted_run_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    bench = original(pope_folder(tmp_path / "data"))
    whole = run(bench, tmp_path / "whole", Fake())
    with pytest.raises(KeyboardInterrupt):
        run(bench, tmp_path / "run", Fake(stop_after=2))
    path = tmp_path / "run" / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-30])  # as a kill in the middle of a write leaves it
    ask = Fake()
    resumed = run(bench, tmp_path / "run", ask)
    assert ask.calls == [5, 5, 5, 4]  # the torn batch is asked as a whole, only its missing record is written
    assert [{**record, "time": 0} for record in resumed] == [{**record, "time": 0} for record in whole]
    done = Fake()
    assert run(bench, tmp_path / "run", done) == resumed
    assert done.calls == []


def test_broken_and_missing_images_fail_their_records_and_the_run_goes_on(tmp_path: Path) -> None:
    data = pope_folder(tmp_path / "data")
    (data / "images" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (data / "images" / "2.png").unlink()
    bench, ask = original(data), Fake()
    records = run(bench, tmp_path / "run", ask)
    lost = {record["id"]: record["error"] for record in records if record["status"] == "failed"}
    assert len(records) == 24 and len(lost) == 12
    assert "1.png: UnidentifiedImageError" in lost["random/1"]
    assert "2.png: FileNotFoundError" in lost["random/2"]
    assert sum(ask.calls) == 12
    row = summary.row("none", "none", "x", bench, bench.items, records, summary.cost_of(records))
    assert row.score["failed"] == 12 and set(row.failed) == set(lost)
    assert row.score["pooled"]["total"] == 12


def test_when_every_image_is_broken_there_is_a_table_all_the_same(tmp_path: Path) -> None:
    data = pope_folder(tmp_path / "data")
    for path in (data / "images").iterdir():
        path.write_text("broken")
    bench = original(data)
    records = run(bench, tmp_path / "run", Fake())
    row = summary.row("none", "none", "x", bench, bench.items, records, summary.cost_of(records))
    assert len(row.failed) == 24 and row.cost == {"questions": 0}
    assert summary.table(bench, [row]).row_count == 1


def test_cost_is_a_median_over_full_batches(tmp_path: Path) -> None:
    bench = original(pope_folder(tmp_path / "data"))
    cost = summary.cost_of(run(bench, tmp_path / "run", Fake()))
    assert cost["prefill_ms"] == 25.0  # 10, 20, 30, 40; the last batch of 4 is left out
    assert cost["prefill_ms_per_question"] == 5.0
    assert cost["ms_per_token"] == 3.0
    assert cost["visual_per_layer"] == [16, 16, 4, 4] and cost["average_visual_tokens"] == 10
    assert cost["prefill_macs_ratio"] == 0.5


def test_limit_takes_the_first_of_every_category(tmp_path: Path) -> None:
    bench = original(pope_folder(tmp_path / "data"))
    assert [item.id for item in bench.take(1)] == ["random/0", "popular/0", "adversarial/0"]
    assert bench.take(None) == bench.items


def test_images_are_looked_for_and_named_when_absent(tmp_path: Path) -> None:
    data = pope_folder(tmp_path / "data")
    (data / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"none of the 4 images.*0\.png.*--images FOLDER"):
        original(data)
    assert original(data, images=tmp_path / "elsewhere").open_image("0.png").size == (20, 20)


def test_a_real_model_without_data_is_told_what_to_fetch() -> None:
    with pytest.raises(DataError, match=r"coco_pope_random\.json.*github\.com/RUCAIBox/POPE.*val2014\.zip.*--data"):
        benches.load("pope", embedded=False)


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="did you mean 'pope'"):
        benches.load("popes", embedded=True)
    with pytest.raises(DataError, match="official, lmms_eval"):
        benches.load("pope", embedded=True, profile="strict")
    with pytest.raises(DataError, match="bare, single_word"):
        benches.load("pope", embedded=True, prompt="polite")
    with pytest.raises(DataError, match="leave --data out"):
        benches.load("scenes", embedded=True, data="x")
    with pytest.raises(DataError, match="--batch-size 0"):
        runner.Settings(batch_size=0)


def test_rendered_benchmarks_have_items_images_and_a_hash() -> None:
    found = benches.load("pope", embedded=True, scenes_count=3)
    assert {item.group for item in found.items} == set(pope.CATEGORIES)
    assert found.open_image(found.items[0].image).mode == "RGB"
    assert len(found.sha256) == 64 and found.prompt == "bare"
    assert {item.group for item in benches.load("scenes", embedded=True, scenes_count=3).items} <= set(scenes.TASKS)


def test_exact_match_ignores_blanks_case_and_a_period() -> None:
    items = [Item("loc/1", "a", "?", "north west", "loc"), Item("digits/2", "a", "?", "4 7", "digits")]
    found = scenes.score(items, [("loc/1", "North west."), ("digits/2", "47 7")])
    assert found["tasks"]["loc"]["accuracy"] == 1.0 and found["tasks"]["digits"]["accuracy"] == 0.0
    assert found["mean_accuracy"] == 0.5
    assert scenes.score(items, [("loc/1", "x")], failed={"digits/2"})["undefined"] == ["digits"]


def test_specs_are_split_and_made_canonical() -> None:
    found = runner.split_specs("none; fastv( keep = 0.25 ) ;; fastv(keep=0.25)")
    assert found == {"none": "none", "fastv(keep=0.25)": "fastv( keep = 0.25 )"}
    with pytest.raises(UnknownMethodError, match="fastv"):
        runner.split_specs("none; fastvv")
    with pytest.raises(SpecError):
        runner.split_specs("fastv(")
    with pytest.raises(DataError, match="names no method"):
        runner.split_specs(" ; ")


def test_slugs_are_folder_names() -> None:
    assert runner.slug("fastv(keep=0.5) + random(keep=[0.5, 0.25])") == "fastv-keep=0.5+random-keep=-0.5,0.25"
    long = [runner.slug(f"fastv(keep={[0.5] * 40 + [share]})") for share in (0.1, 0.2)]
    assert max(map(len, long)) <= 80 and long[0] != long[1]
    assert runner.slug("../..") not in ("..", ".", "")


def test_reading_and_scoring_a_run_imports_no_torch() -> None:
    parts = ("records", "items", "benchmarks.pope", "benchmarks.scenes", "stats", "summary", "bench")
    code = "; ".join(f"import vlmattn.eval.{part}" for part in parts)
    subprocess.run([sys.executable, "-c", f"{code}; import sys; assert 'torch' not in sys.modules"], check=True)
