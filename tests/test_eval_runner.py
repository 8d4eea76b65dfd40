"""The runner with a model that is not one: batches, resume, records, broken images, cost."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from folders import COST
from PIL import Image

from vlmattn.errors import DataError
from vlmattn.eval import bench as benches
from vlmattn.eval import models, runner, summary, tabular
from vlmattn.eval.benchmarks import pope, scenes
from vlmattn.eval.items import Benchmark
from vlmattn.eval.records import RunFolder, kept_tokens, pack_tokens, read_records
from vlmattn.eval.runs import Run
from vlmattn.scenes import library, names

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
        times = {"prefill_ms": 10.0 * len(self.calls), "decode_ms": 6.0, "new_tokens": 3}
        texts = ["Yes" if image.width % 2 == 0 else "No" for image in images]
        count = len(texts)
        kept = [{"method": "fastv", "before_layer": 2, "mask": pack_tokens([0, 3], 16)}]
        return SimpleNamespace(
            texts=texts,
            truncated=[row == 0 for row in range(count)],
            margins=[1.5 if text == "Yes" else -1.5 for text in texts],
            seen=[{"kept": kept, "geometry": {"grid": [1, 4, 4]}} if row else {} for row in range(count)],
            costs=[COST] * count,
            times=times,
        )


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


def row_of(bench: Benchmark, records: list[dict]) -> summary.Row:
    return summary.row(Run.of("x", records, IDENTITY, {}, bench.scorer, "none"))


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
    assert row_of(bench, records).score["values"]["mean_f1"] == 1.0


def test_a_record_has_what_comparisons_and_pages_need(tmp_path: Path) -> None:
    bench = original(pope_folder(tmp_path / "data"))
    first, second, *_ = run(bench, tmp_path / "run", Fake())
    assert list(first) == [
        *("id", "image", "group", "question", "label", "prompt", "status", "text"),
        *("truncated", "margin", "cost", "time"),
    ]
    assert "truncated" not in second and "gold" not in second
    assert (first["truncated"], first["margin"], second["margin"]) == (True, 1.5, -1.5)
    assert [kept_tokens(stage) for stage in second["kept"]] == [[0, 3]]
    assert second["geometry"] == {"grid": [1, 4, 4]}
    assert first["time"] == {"batch": 0, "questions": 5, "prefill_ms": 10.0, "decode_ms": 6.0, "new_tokens": 3}


def test_only_yes_no_questions_have_a_margin_and_gold_is_kept(tmp_path: Path) -> None:
    bench = benches.load("scenes", embedded=True, scenes_count=2, tasks=("random", "color", "pairs", "caption"))
    found = run(bench, tmp_path / "run", Fake())
    assert {record["group"] for record in found if "margin" in record} == {"random"}
    golds = {item.id: dict(item.gold) for item in bench.items}
    assert {record["id"]: record.get("gold", {}) for record in found} == golds
    assert Run.of("x", found, IDENTITY, {}, bench.scorer, "none").items == tuple(bench.items)


def test_captions_are_asked_last_and_nothing_else_moves() -> None:
    bench = benches.load("scenes", embedded=True, scenes_count=3)
    asked = runner.ordered(bench, bench.items)
    others = [item for item in bench.items if item.group != "caption"]
    assert asked[: len(others)] == others
    assert {item.group for item in asked[len(others) :]} == {"caption"}


@pytest.mark.parametrize(("kept", "count"), [([], 0), ([], 5), ([0, 7, 8, 15], 16), ([4], 5), (list(range(577)), 577)])
def test_masks_of_tokens_are_read_back(kept: list[int], count: int) -> None:
    import base64

    import numpy as np

    mask = pack_tokens(kept, count)
    assert kept_tokens({"mask": mask}) == kept
    flags = np.isin(np.arange(count), kept)
    assert mask == base64.b64encode(np.packbits(flags, bitorder="little").tobytes()).decode()


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
    row = row_of(bench, records)
    assert row.score["failed"] == 12 and set(row.failed) == set(lost)
    assert sum(group["counts"]["total"] for group in row.score["groups"].values()) == 12


def test_when_every_image_is_broken_there_is_a_table_all_the_same(tmp_path: Path) -> None:
    data = pope_folder(tmp_path / "data")
    for path in (data / "images").iterdir():
        path.write_text("broken")
    bench = original(data)
    records = run(bench, tmp_path / "run", Fake())
    row = row_of(bench, records)
    assert len(row.failed) == 24 and row.cost == {"questions": 0}
    assert tabular.tables("pope", [row])[0].row_count == 1


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
    assert {item.group for item in benches.load("scenes", embedded=True, scenes_count=9).items} == set(
        scenes.chosen(None)
    )


def test_a_model_is_asked_about_the_scenes_that_it_was_trained_on(tmp_path: Path) -> None:
    for name in names():
        assert models.world(name) == library.version(name).world.name
    assert models.world("org/model") == models.world(str(tmp_path)) == scenes.DEFAULT_WORLD


def test_slugs_are_folder_names() -> None:
    assert runner.slug("fastv(keep=0.5) + random(keep=[0.5, 0.25])") == "fastv-keep=0.5+random-keep=-0.5,0.25"
    long = [runner.slug(f"fastv(keep={[0.5] * 40 + [share]})") for share in (0.1, 0.2)]
    assert max(map(len, long)) <= 80 and long[0] != long[1]
    assert runner.slug("../..") not in ("..", ".", "")


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    with models.quiet():
        return models.load("scenes-llava")


@pytest.fixture(scope="module")
def rendered() -> Benchmark:
    tasks, world = ("random", "digits"), models.world("scenes-llava")
    return benches.load("scenes", embedded=True, scenes_count=4, tasks=tasks, world=world)


def job(bench: Benchmark, folder: Path, count: int | None = None) -> runner.Job:
    return runner.Job("none", "none", "none", bench, bench.items[:count], folder)


def test_generation_settings_of_the_checkpoint_are_a_part_of_the_identity_but_not_of_margins(
    loaded: models.Loaded, rendered: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = runner.Settings(batch_size=8)
    assert "generation_config" not in runner.identity(loaded, rendered, "none", settings)["decode"]
    runner.answer_all(loaded, [job(rendered, tmp_path / "plain")], settings)
    config = loaded.model.generation_config
    monkeypatch.setattr(config, "temperature", 0.3)  # sampling says nothing about greedy answers
    monkeypatch.setattr(config, "repetition_penalty", 1.7)
    monkeypatch.setattr(config, "no_repeat_ngram_size", 3)
    decode = runner.identity(loaded, rendered, "none", settings)["decode"]
    assert decode["generation_config"] == {"no_repeat_ngram_size": 3, "repetition_penalty": 1.7}
    with pytest.raises(DataError, match=r"decode\.generation_config\.repetition_penalty was null, now it is 1\.7"):
        runner.answer_all(loaded, [job(rendered, tmp_path / "plain")], settings)
    runner.answer_all(loaded, [job(rendered, tmp_path / "penalty")], settings)
    margins = [
        [record["margin"] for record in read_records(tmp_path / name) if "margin" in record]
        for name in ("plain", "penalty")
    ]
    assert margins[0] and margins[0] == margins[1]


def test_a_run_that_was_mended_is_the_file_of_one_that_was_never_broken(
    loaded: models.Loaded, rendered: Benchmark, tmp_path: Path
) -> None:
    def open_image(name: str) -> Image.Image:
        if name == rendered.items[0].image:
            raise OSError("broken")
        return rendered.open_image(name)

    broken = dataclasses.replace(rendered, open_image=open_image)
    settings = runner.Settings(batch_size=2)
    whole = runner.answer_all(loaded, [job(rendered, tmp_path / "whole")], settings)["none"]
    assert runner.answer_all(loaded, [job(broken, tmp_path / "run")], settings)["none"].failed
    again = dataclasses.replace(settings, retry_failed=True)
    mended = runner.answer_all(loaded, [job(rendered, tmp_path / "run")], again)["none"]
    assert [record["id"] for record in read_records(tmp_path / "run")] == [item.id for item in rendered.items]
    assert mended.items == whole.items == Run.load(tmp_path / "run").items
    assert mended.tally.images == whole.tally.images


def test_progress_counts_the_questions_of_the_job_only(
    loaded: models.Loaded, rendered: Benchmark, tmp_path: Path
) -> None:
    settings, told = runner.Settings(batch_size=8), []
    runner.answer_all(loaded, [job(rendered, tmp_path)], settings)
    runner.answer_all(loaded, [job(rendered, tmp_path, count=3)], settings, lambda *step: told.append(step))
    assert set(told) == {("none", 3, 3)}


def test_a_seed_that_torch_cannot_take_is_refused() -> None:
    for seed in (-1, 2**63):
        with pytest.raises(DataError, match=rf"--seed {seed} must be 0 or more and below 2\*\*63"):
            runner.Settings(seed=seed)
    runner.Settings(seed=2**63 - 1)


def test_reading_and_scoring_a_run_imports_no_torch() -> None:
    parts = ("records", "items", "tally", "benchmarks.pope", "benchmarks.scenes", "stats", "summary", "bench")
    parts += ("runs", "compare", "controls", "plots", "page", "views")
    code = "; ".join(f"import vlmattn.eval.{part}" for part in parts)
    subprocess.run([sys.executable, "-c", f"{code}; import sys; assert 'torch' not in sys.modules"], check=True)
