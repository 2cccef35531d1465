"""Wrong requests: each ends with exit code 2 and one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import THREADS, Forks, chat_row, checkpoint, state, sums, swift, swift_process, weights, write_rows

SKIP = " (bad_rows=skip leaves such rows out, and counts them)"
SHAPES = (
    "messages (or conversations), instruction/input/output, query/response/history, prompt/completion, question/answer, "
    "problem/solution, chosen/rejected, text (or map your keys: dataset.columns.KEY=query)"
)
RANK = "tuner.lora: unknown option 'rnak'. Did you mean: rank?"

OPTIONS = {
    "option of a tuner": (["tuner.rnak=4"], RANK),
    "option of a trainer": (["trainer.epoch=4"], "trainer.sft: unknown option 'epoch'. Did you mean: epochs?"),
    "option of a backend": (["backend.procesess=2"], "backend.torch: unknown option 'procesess'. Did you mean: processes?"),
    "option of the model": (["model.dtype=x"], "model.transformers: unknown option 'dtype'. It has: attention, labels, "
                            "num_labels, problem, revision, task."),
    "option of the run": (["sed=4"], "config: unknown option 'sed'. Did you mean: seed?"),
    "flag": (["--outptu", "x"], "No such option '--outptu'. Did you mean '--output'?"),
    "whole number": (["tuner.rank=abc"], "tuner.lora.rank: expected whole number, not 'abc'"),
    "fraction": (["tuner.rank=1.5"], "tuner.lora.rank: expected whole number, not '1.5'"),
    "number": (["trainer.learning_rate=fast"], "trainer.sft.learning_rate: expected number, not 'fast'"),
    "choice": (["trainer.schedule=cos"], "trainer.sft.schedule: expected one of cosine, linear, constant, not 'cos'"),
    "truth": (["trainer.packing=perhaps"], "trainer.sft.packing: expected true or false, not 'perhaps'"),
    "mapping": (["template.kwargs=3"], "template.checkpoint.kwargs: expected mapping, not '3'"),
    "value": (["tuner.rank=0"], "tuner.lora: rank must be at least 1, not 0"),
    "processes": (["--nproc", "0"], "backend.torch: processes must be at least 1, not 0"),
    "weight": (["dataset.0.weight=-1"], "dataset.0.weight: expected a number above 0, not -1.0"),
    "list index": (["dataset.3.weight=1"], "dataset.3.weight: dataset has 1 entries, counted from 0"),
    "no value": (["tuner.rank"], "tuner.rank: no such file; an option is written KEY=VALUE, and a configuration "
                 "ends in .yaml"),
    "tuner": (["--tuner", "lroa"], "no tuner 'lroa'. Did you mean: lora? Installed: full, lora."),
    "trainer": (["--trainer", "stf"], "no trainer 'stf'. Did you mean: sft? Installed: cispo, classify, cpo, dapo, dpo, "
                "dr_grpo, embed, gkd, grpo, gspo, kto, orpo, ppo, prm, pt, reinforce_plus_plus, rerank, reward, rloo, sapo, "
                "sft, simpo, tag."),
    "backend": (["--backend", "trch"], "no backend 'trch'. Did you mean: torch? Installed: torch."),
    "quantizer": (["--quantizer", "hqqq"], "no quantizer 'hqqq'. Did you mean: hqq? Installed: hqq."),
    "template": (["--template", "palin"], "no template 'palin'. Did you mean: plain? Installed: checkpoint, classify, embed, "
                 "gemma, llama, mistral, plain, qwen, rerank, reward, tag."),
    "provider": (["tuner.provider=x"], "tuner 'lora' has no provider 'x'. Providers installed: swift-plugin-lora 0.1.0."),
    "template file": (["template.file=no.jinja"], "template.file: no.jinja cannot be read: No such file or directory"),
    "targets": (["tuner.targets=qproj"],
                "tuner.lora: targets ['qproj'] match no layer of the model. Its linear layers: down_proj, gate_proj, k_proj, "
                "lm_head, o_proj, q_proj, up_proj, v_proj"),
    "freeze": (["--freeze", "layer.9"], "freeze: no trained parameter's name begins with 'layer.9'; the first is "
               "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"),
    "device": (["backend.device=tpuu"], "backend.torch.device: 'tpuu' is no device; use auto, cpu, cuda or cuda:N"),
    "from": (["--from", "nowhere"], "from: nowhere: no such folder"),
    "holdout": (["holdout=13"], "holdout: 13 rows kept back of 13 leave none to train on"),
    "holdout below 0": (["holdout=-1"], "holdout: expected a share below 1 or a count, not -1"),
    "max_length": (["trainer.max_length=5"], "dataset: no row is left to train on (13 dropped of 13 rows)"),
    "max_length, cut": (["trainer.max_length=5", "trainer.overflow=truncate-right"],
                        "dataset: no row is left to train on (13 dropped of 13 rows)"),
    "resume": (["trainer.resume=nowhere"], "trainer.resume: nowhere is not a checkpoint"),
}  # fmt: skip


@pytest.fixture
def no_data(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A sound request but for the data set. Relative paths start from an empty folder."""
    monkeypatch.chdir(tmp_path)
    return ["train", "--model", tiny_folder, "--output", "out", THREADS, "trainer.epochs=1"]


@pytest.fixture
def command(no_data: list[object], rows: Path) -> list[object]:
    """A sound request; a test adds what is wrong."""
    return [*no_data, "--dataset", rows]


@pytest.mark.parametrize("name", OPTIONS)
def test_options(command: list[object], name: str) -> None:
    wrong, message = OPTIONS[name]
    done = swift(*command, *wrong)
    assert (done.error, done.code, done.out) == (message, 2, "")
    assert not Path("out").exists(), "a refused request leaves nothing behind"


NAMES = {
    "near id": ("smollm2-135m-instrct",
                "model 'smollm2-135m-instrct': no such folder, and no installed model id. Did you mean: "
                "smollm2-135m-instruct? Installed ids: smollm2-135m-instruct. A hub id reads owner/name."),
    "far id": ("nothing", "model 'nothing': no such folder, and no installed model id. Installed ids: smollm2-135m-instruct. "
               "A hub id reads owner/name."),
    "family": ("transformers", "model 'transformers' is a family, not a checkpoint: give a folder or a hub id"),
    "file": ("some.file", "model 'some.file' is a file; give the folder that holds config.json and the weights"),
    "folder": (".", "model .: the folder holds neither config.json nor an adapter nor a run"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_model_names(command: list[object], name: str) -> None:
    Path("some.file").touch()
    given, message = NAMES[name]
    done = swift(*command, "--model", given)
    assert (done.error, done.code) == (message, 2)


DATASETS = {
    "near file": ("trian.csv", "dataset 'trian.csv': no such file. Did you mean: train.csv?"),
    "no folder": ("data/rows.jsonl", "dataset 'data/rows.jsonl': no such file, and no folder 'data'."),
    "near id": ("identty", "dataset 'identty': no such file or folder, nor an installed data set (see: swift-core datasets "
                "list). A hub id reads OWNER/NAME. Did you mean: identity?"),
    "plugin's name": ("huggingface", "dataset.0: 'huggingface' opens files; give the file, folder or hub id itself"),
    "empty": ("empty.jsonl", "dataset 'empty.jsonl' is empty: it has no rows"),
    "form": ("rows.bin", "dataset 'rows.bin': cannot tell the form of .bin. Known: .jsonl, .ndjson, .json, .csv, .tsv, .txt, "
             ".parquet, .arrow; text forms also .gz"),
    "shape": ("shape.jsonl", f"shape.jsonl:3: unrecognised row; keys found: foo, bar. Known shapes: {SHAPES}{SKIP}"),
    "json": ("cut.jsonl", f"cut.jsonl:2: not valid JSON: Expecting ',' delimiter: line 1 column 17 (char 16){SKIP}"),
    "untrained": ("untrained.jsonl", "untrained.jsonl:2: the row has no trainable token: no assistant message with content, or "
                  f"train: false on all{SKIP}"),
    "role": ("role.jsonl", "role.jsonl:1: messages[0]: unknown role 'robot'; known: system, developer, user, human, assistant, "
             "gpt, bot, tool, function, tool_response, function_response, observation, observations, function_call, "
             f"tool_call{SKIP}"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATASETS)
def test_data_sets(no_data: list[object], name: str) -> None:
    good = chat_row("Hello?", "Yes.")
    write_rows(Path("rows.jsonl"), [good])
    Path("empty.jsonl").touch()
    Path("train.csv").touch()
    Path("rows.bin").write_bytes(b"\0\1")
    write_rows(Path("shape.jsonl"), [good, good, {"foo": 1, "bar": 2}])
    Path("cut.jsonl").write_text(json.dumps(good) + '\n{"messages": [{}\n', encoding="utf-8")
    untrained = {"messages": [good["messages"][0], {**good["messages"][1], "train": False}]}
    write_rows(Path("untrained.jsonl"), [good, untrained])
    write_rows(Path("role.jsonl"), [{"messages": [{"role": "robot", "content": "?"}]}])
    given, message = DATASETS[name]
    done = swift(*no_data, "--dataset", given)
    shown = done.error.replace(f"{Path.cwd()}/", "")
    assert (shown, done.code) == (message, 2)
    assert not Path("out").exists()


def test_no_data_set(no_data: list[object]) -> None:
    done = swift(*no_data)
    assert done.error == "dataset is missing: --dataset FILE, a folder, or an id of `swift-core datasets list`"
    assert done.code == 2


YAML = {
    "missing": (None, "run.yaml: no such file"),
    "list": ("- 1\n", "run.yaml: expected a mapping of options, not list"),
    "component": ("tuner: 3\n", "tuner: expected a name or a mapping, not '3'"),
    "type": ("tuner: {name: lora, rank: [1]}\n", "tuner.lora.rank: expected whole number, not list"),
    "option": ("tuner: {name: lora, rnak: 4}\n", RANK),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(command: list[object], name: str) -> None:
    text, message = YAML[name]
    if text is not None:
        Path("run.yaml").write_text(text, encoding="utf-8")
    done = swift(*command, "run.yaml")
    assert (done.error, done.code) == (message, 2)


def test_yaml_that_does_not_parse_says_where(command: list[object]) -> None:
    Path("run.yaml").write_text("tuner: lora\nmodel: [1\n", encoding="utf-8")
    error = swift(*command, "run.yaml").error
    assert error.startswith("run.yaml: not valid YAML: ")
    assert "line 2" in error


def test_skipped_rows_are_counted_and_listed(no_data: list[object]) -> None:
    good = sums(1, 5)
    write_rows(Path("rows.jsonl"), [*good[:2], {"foo": 1}, {"messages": [{"role": "user", "content": "?"}]}, *good[2:]])
    done = swift(*no_data, "--dataset", "rows.jsonl", "bad_rows=skip").ok()
    assert "warning: 2 rows refused (listed in data/issues.jsonl)" in done.err.splitlines()
    issues = [json.loads(line) for line in Path("out/data/issues.jsonl").read_text(encoding="utf-8").splitlines()]
    where = [str(Path("rows.jsonl").resolve()) + f":{line}" for line in (3, 4)]
    assert [issue["where"] for issue in issues] == where
    assert [issue["what"] for issue in issues] == ["refused", "refused"]
    assert issues[0]["reason"] == f"unrecognised row; keys found: foo. Known shapes: {SHAPES}"
    assert issues[1]["reason"] == "the row has no trainable token: no assistant message with content, or train: false on all"
    account = json.loads(Path("out/log.jsonl").read_text(encoding="utf-8").splitlines()[0])["data"]
    assert (account["rows"], account["samples"], account["reasons"]) == (7, 5, {"refused": 2})


def test_long_rows_are_counted_with_their_tokens(no_data: list[object]) -> None:
    write_rows(Path("rows.jsonl"), [chat_row("Hi", "Yes."), chat_row("Hi", "Y" * 100)])
    swift(*no_data, "--dataset", "rows.jsonl", "trainer.max_length=60").ok()
    (issue,) = (json.loads(line) for line in Path("out/data/issues.jsonl").read_text(encoding="utf-8").splitlines())
    length = len("user\nHi\nassistant\n\n") + 4 + 100  # bytes of the text, and a token for each of the four marks
    assert issue == {"where": f"{Path('rows.jsonl').resolve()}:2", "what": "dropped", "tokens": length,
                     "reason": f"{length} tokens, max_length 60"}  # fmt: skip


@pytest.mark.parametrize("size", [0, 4, 100, 100_000])
def test_truncated_weights(command: list[object], tiny_folder: Path, size: int) -> None:
    whole = (tiny_folder / "model.safetensors").read_bytes()
    shutil.copytree(tiny_folder, "model")
    Path("model/model.safetensors").write_bytes(whole[:size])
    needed = len(whole) if size >= 100_000 else 8 + (int.from_bytes(whole[:8], "little") if size else 0)
    done = swift(*command, "--model", "model")
    assert done.code == 2
    assert done.error == (
        f"{Path('model').resolve()}/model.safetensors is truncated: it has {size} bytes, its header needs {needed}. "
        "Copy it again from its source"
    )
    assert not Path("out").exists()
    Path("model/model.safetensors").write_bytes(whole)
    swift(*command, "--model", "model").ok()  # put right, the same request goes through


def test_a_shard_that_is_missing(command: list[object], tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, "model")
    Path("model/model.safetensors").rename("model/model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    Path("model/model.safetensors.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    done = swift(*command, "--model", "model")
    missing = "lacks 1 of 2 weight files, model-00002-of-00002.safetensors first"
    assert (done.error, done.code) == (f"model {Path('model').resolve()} {missing}", 2)


def test_weights_that_are_pickles(command: list[object], tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, "model")
    Path("model/model.safetensors").rename("model/pytorch_model.bin")
    done = swift(*command, "--model", "model")
    assert (done.error, done.code) == (
        f"model {Path('model').resolve()} holds .bin weights only; allow_pickle=true reads them with weights_only=True", 2,
    )  # fmt: skip


# --- the output folder ------------------------------------------------------------------------------------------------


def test_output_that_holds_another_run(command: list[object]) -> None:
    swift(*command).ok()
    before = weights(Path("out"))
    done = swift(*command, "tuner.rank=2")
    assert (done.error, done.code) == (
        "output out already holds a run. Continue it with trainer.resume=true, replace it with --overwrite, or choose "
        "another --output", 2,
    )  # fmt: skip
    assert "data:" not in done.err, "it is said before the data is read"
    assert weights(Path("out")) == before
    swift(*command, "tuner.rank=2", "--overwrite").ok()
    assert weights(Path("out")) != before


def test_output_that_holds_files_of_somebody_else(command: list[object]) -> None:
    Path("out/data").mkdir(parents=True)
    Path("out/data/mine.jsonl").write_text("{}", encoding="utf-8")
    for more in ([], ["--overwrite"], ["trainer.resume=true"]):
        done = swift(*command, *more)
        assert (done.error, done.code) == ("output out holds 'data', and no run wrote it; choose another --output", 2)
    assert [path.name for path in Path("out").rglob("*")] == ["data", "mine.jsonl"]


def test_output_that_cannot_be_made(command: list[object]) -> None:
    Path("file").touch()
    done = swift(*command, "--output", "file")
    assert (done.error, done.code) == ("output file: a file of that name exists; choose another --output", 2)
    done = swift(*command, "--output", "file/out")
    reason = f"output file/out cannot be made: {Path('file').resolve()} is a file; choose another --output"
    assert (done.error, done.code) == (reason, 2)


# --- earlier runs -----------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run(command: list[object], tiny_folder: Path) -> None:
    done = swift(*command, "--from", tiny_folder)
    expected = f"from: {tiny_folder} is neither a run nor a checkpoint; give a model's folder with --model"
    assert (done.error, done.code) == (expected, 2)
    Path("killed/checkpoints/.step-3.tmp").mkdir(parents=True)
    done = swift(*command, "--from", "killed")
    assert (done.error, done.code) == ("run killed has no finished checkpoint yet", 2)


def test_an_adapter_as_the_model(command: list[object]) -> None:
    swift(*command).ok()
    last = Path("out/checkpoints/step-4")
    for name in ("out", str(last)):
        done = swift(*command, "--model", name, "--output", "other")
        expected = f"model {last} is an adapter; train the base model with --from {last}, or merge it first"
        assert (done.error, done.code) == (expected, 2)


def test_from_a_run_with_another_shape(command: list[object]) -> None:
    swift(*command).ok()
    done = swift(*command, "--from", "out", "tuner.rank=4", "--output", "other")
    start = f"{Path('out/checkpoints/step-4').resolve()}/adapter_model.safetensors does not fit tuner.lora's options: "
    assert done.error.startswith(start)
    assert done.code == 2
    assert not Path("other").exists()


CHANGES = {
    "tuner": (["tuner.rank=4"], "tuner.rank was 8 and is 4"),
    "trainer": (["trainer.learning_rate=1"], "trainer.learning_rate was 0.0001 and is 1.0"),
    "seed": (["seed=1"], "seed was 42 and is 1"),
    "freeze": (["--freeze", "re:layers.0"], "freeze was [] and is ['re:layers.0']"),
    "quantizer": (["--quantizer", "hqq"], None),
    "processes": (["--nproc", "2"], "backend.processes was 1 and is 2"),
    "model": (["model.attention=eager"], "model.attention was auto and is eager"),
    "tuner plugin": (["--tuner", "full"], None),
    "two": (["seed=1", "tuner.alpha=1"], "tuner.alpha was 16.0 and is 1.0; seed was 42 and is 1"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_resume_with_other_settings(command: list[object], name: str) -> None:
    swift(*command).ok()
    before = state(Path("out"))
    changed, message = CHANGES[name]
    done = swift("train", "out/config.yaml", "trainer.resume=true", *changed)
    last = Path("out/checkpoints/step-4")
    start, end = (
        f"trainer.resume: {last} was made with other settings: ",
        (f". Set them back, or begin a new run from its weights: --from {last} --output NEW"),
    )
    assert done.code == 2
    assert done.error.startswith(start)
    assert done.error.endswith(end)
    assert message in (None, done.error.removeprefix(start).removesuffix(end))
    assert state(Path("out")) == before
    swift("train", "out/config.yaml", "trainer.resume=true", "trainer.max_steps=5").ok()  # its length may change


def edit_plan(**changes: Any) -> None:
    """As if the checkpoint had been made elsewhere."""
    file = Path("out/checkpoints/step-4/plan.json")
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_resume_by_another_plugin(command: list[object]) -> None:
    """Two plugins may offer one name, and they need not compute the same."""
    swift(*command).ok()
    components = json.loads(Path("out/checkpoints/step-4/plan.json").read_text(encoding="utf-8"))["components"]
    components["tuner"]["plugin"] = "acme-lora"
    edit_plan(components=components)
    done = swift("train", "out/config.yaml", "trainer.resume=true", "trainer.max_steps=5")
    assert done.code == 2
    assert "settings: tuner.provider was acme-lora and is swift-plugin-lora. Set them back" in done.error


def test_resume_with_other_versions_is_warned_of(command: list[object]) -> None:
    swift(*command).ok()
    plugins = json.loads(Path("out/checkpoints/step-4/plan.json").read_text(encoding="utf-8"))["plugins"]
    edit_plan(plugins={**plugins, "swift-plugin-lora": "0.0.9"})
    done = swift("train", "out/config.yaml", "trainer.resume=true", "trainer.max_steps=5").ok()
    last = Path("out/checkpoints/step-4")
    said = f"warning: {last} was made with other versions, so its numbers may go on otherwise: "
    said += "swift-plugin-lora 0.0.9 (now 0.1.0)"
    assert done.err.splitlines().count(said) == 1


@pytest.mark.parametrize("change", ["dataset", "holdout", "sample"])
def test_resume_with_other_data(command: list[object], change: str) -> None:
    swift(*command).ok()
    other = write_rows(Path("other.jsonl"), sums(2, 13))
    wrong = {"dataset": f"dataset={other}", "holdout": "holdout=2", "sample": "dataset.0.sample=7"}[change]
    done = swift("train", "out/config.yaml", "trainer.resume=true", wrong)
    last = Path("out/checkpoints/step-4")
    assert (done.error, done.code) == (
        f"trainer.resume: {last} was made with other data: the samples are not the same now. Set dataset, eval_dataset and "
        f"holdout back, or begin a new run from its weights: --from {last} --output NEW", 2,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["optimizer.safetensors", "random-0.safetensors", "trainer.json", "adapter_model.safetensors",
                                  "plan.json"])  # fmt: skip
def test_resume_a_damaged_checkpoint(command: list[object], name: str) -> None:
    swift(*command, "trainer.save_every=1", "trainer.keep=0").ok()
    whole, last = state(Path("out")), Path("out/checkpoints/step-4")
    file = last / name
    file.write_bytes(file.read_bytes()[:100])
    done = swift("train", "out/config.yaml", "trainer.resume=true", "trainer.max_steps=5")
    assert done.code == 2
    if name in ("adapter_model.safetensors", "plan.json"):
        assert done.error.startswith(f"{file} cannot be read: ")
    else:
        assert done.error.startswith(f"checkpoint {last} cannot be resumed: {name}: ")
        assert done.error.endswith(". Name an earlier one: trainer.resume=FOLDER")
    swift("train", "out/config.yaml", f"trainer.resume={checkpoint(Path('out'), 3)}").ok()
    assert state(Path("out")) == whole


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_disk_full_while_saving(command: list[object], forks: Forks) -> None:
    """A limit on a file's size stops the optimizer's file half-way, as a full disk would."""
    swift(*command, "trainer.max_steps=2", "trainer.schedule=constant").ok()
    output, last = Path("out").resolve(), Path("out/checkpoints/step-2")
    before = state(output)
    full = ["train", output / "config.yaml", "--output", output, "trainer.resume=true", "trainer.max_steps=4"]
    done = forks.run(*full, file_limit=(last / "optimizer.safetensors").stat().st_size - 1)
    assert done.code == 1
    assert done.error.startswith(f"saving step 4 to {output}/checkpoints failed: ")
    assert os.strerror(errno.EFBIG) in done.error
    assert done.error.endswith(f"; the last good checkpoint is {output}/checkpoints/step-2")
    assert [path.name for path in sorted(output.glob("checkpoints/*"))] == ["best", "last", "step-2"][1:]
    assert state(output) == before
    swift(*full).ok()  # with room again, it goes on from there
    assert checkpoint(output).resolve().name == "step-4"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_full_to_the_last_byte(command: list[object], rows: Path, small_disk: Path) -> None:
    output, whole = small_disk / "run", Path("whole")
    command = [*command, "trainer.epochs=20"]
    done = swift(*command, "--output", output, "trainer.save_every=1", "trainer.keep=0")
    last = max(output.glob("checkpoints/step-*"), key=lambda path: int(path.name[5:]))
    assert done.code == 1
    assert "o space left on device" in done.error
    assert done.error.endswith(f"; the last good checkpoint is {last}")
    swift("infer", "--model", output, "--dataset", rows, "--output", "answers.jsonl", "--max-tokens", "1").ok()
    for path in output.glob("checkpoints/step-*"):
        if path != last:
            shutil.rmtree(path)
    again = ["--output", output, "trainer.resume=true", "trainer.keep=1"]
    assert f"from step {last.name[5:]}" in swift(*command, *again).ok().err
    swift(*command, "--output", whole).ok()
    assert state(output) == state(whole)


def test_one_line_from_the_shell(tiny_folder: Path) -> None:
    """The same in a fresh interpreter: standard error is the line and nothing else."""
    done = swift_process("train", "--model", tiny_folder, "tuner.rnak=4", "--dataset", "rows.jsonl")
    assert (done.code, done.out, done.err) == (2, "", f"error: {RANK}\n")
