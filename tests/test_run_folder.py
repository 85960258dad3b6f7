"""A run's folder: who may have it, from which checkpoint a run goes on, and what is wrong with the others."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from dopsd import checkpoints, run
from dopsd.errors import RunError, UsageError
from dopsd.run_folder import RunFolder, Start

SHARED = {"per_device_train_batch_size": 6, "processes": 1}
CONFIG = {"model": {"model": "tiny"}, "training": {"seed": 1, "output_dir": "a", "nothing": None, **SHARED}}
FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")


def saved(output: Path, number: int, sealed: bool = True) -> Path:
    """A checkpoint, of files that only their names and hashes are read of."""
    folder = output / f"checkpoint-{number}"
    checkpoints.begin(folder)
    (folder / "teacher").mkdir()
    for name in (*FILES, "pending.json", "teacher/adapter_model.safetensors"):
        (folder / name).write_text(f"{name} of {number}")
    if sealed:
        checkpoints.seal(folder)
    return folder


def opened(output: Path, resume: str | None = "true", **config: object) -> Start:
    with RunFolder(output, {**CONFIG, **config}) as folder:
        return folder.open(resume)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A claimed folder."""
    with RunFolder(tmp_path / "run", CONFIG) as folder:
        folder.open(None)
        folder.claim()
    return tmp_path / "run"


def test_which_checkpoint_a_run_goes_on_from(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest that is complete by number, none when there is none yet; another option or no run is an error."""
    absent = tmp_path / "absent"
    assert opened(absent, None) == opened(absent, "false") == Start(None, None) and not absent.exists()
    with pytest.raises(UsageError, match="holds no run"):
        opened(absent)
    assert opened(output) == Start(None, None)
    with pytest.raises(UsageError, match="output_dir="):
        opened(output, None)
    assert json.loads((output / "run.json").read_text()).items() >= CONFIG.items()

    saved(output, 3, sealed=False)
    assert opened(output) == Start(None, None)  # a run that was killed in its first checkpoint begins anew
    assert "checkpoint-3: it has no manifest.json" in capsys.readouterr().out
    folders = [saved(output, number) for number in (2, 9, 10)]
    saved(output, 11, sealed=False)
    capsys.readouterr()
    assert opened(output) == Start(str(folders[-1]), None)
    assert "checkpoint-11 is skipped: it has no manifest.json" in capsys.readouterr().out
    assert opened(output, str(folders[0])) == Start(str(folders[0]), None)
    with pytest.raises(RunError, match=r"checkpoint-11.*no complete checkpoint"):
        opened(output, str(output / "checkpoint-11"))
    assert opened(output, training={**CONFIG["training"], "output_dir": "b"}) == Start(str(folders[-1]), None)
    with pytest.raises(UsageError, match=r"seed=2 can't be used: the run in .* has seed=1"):
        opened(output, training={**CONFIG["training"], "seed": 2})
    shared = {**CONFIG["training"], "per_device_train_batch_size": 2, "processes": 3, "fsdp": "full_shard"}
    assert opened(output, training=shared) == Start(str(folders[-1]), None)
    with pytest.raises(UsageError, match=r"batch_size=2 can't be used: .* has batches of 6 prompts over all .* of 4"):
        opened(output, training={**shared, "processes": 2})
    # A run of the last release goes on with what is called otherwise now.
    (output / "run.json").write_text(
        json.dumps({"id": checkpoints.run_id(output), "teaching": {"update_per_slice": 2}})
    )
    assert opened(output, teaching={"updates_per_batch": 2}) == Start(str(folders[-1]), None)
    with pytest.raises(UsageError, match=r"updates_per_batch=1 can't be used: the run in .* has updates_per_batch=2"):
        opened(output, teaching={"updates_per_batch": 1})


@pytest.mark.parametrize(("word", "kind"), [("off", "none"), ("dual", "block")])
def test_a_run_goes_on_whose_cache_an_earlier_release_named(tmp_path: Path, word: str, kind: str) -> None:
    """Its folder says what that kind was called then; another kind is another option."""
    with RunFolder(tmp_path, {**CONFIG, "rollout": {"cache": word}}) as folder:
        folder.claim()
    assert opened(tmp_path, rollout={"cache": kind}) == Start(None, None)
    with pytest.raises(UsageError, match=f"cache='prefix' can't be used: the run in .* has cache='{kind}'"):
        opened(tmp_path, rollout={"cache": "prefix"})


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [Path.unlink, empty, cut, flip], ids=lambda harm: harm.__name__)
def test_a_harmed_file_is_found(harm: Callable[[Path], None], output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file of the newest checkpoint, its manifest too: the one before is taken, and the file is named. Where none
    is left that is an error with every reason."""
    older = saved(output, 1)
    for name in (*FILES, "pending.json", "teacher/adapter_model.safetensors", "manifest.json"):
        newer = saved(output, 2)
        harm(newer / name)
        assert opened(output) == Start(str(older), None), name
        said = capsys.readouterr().out
        assert "checkpoint-2 is skipped: it" in said and name in said
        with pytest.raises(RunError, match=r"checkpoint-2.*no complete checkpoint.*: it.*" + name):
            opened(output, str(newer))
    harm(saved(output, 2) / "optimizer.pt")
    harm(older / "adapter_model.safetensors")
    with pytest.raises(
        RunError,
        match=r"no checkpoint in .* is complete any more: checkpoint-2: .*optimizer.pt.*; "
        r"checkpoint-1: .*adapter_model.safetensors",
    ):
        opened(output)


def test_a_checkpoint_of_another_run_is_refused(output: Path, tmp_path: Path) -> None:
    """Named or copied into the folder, though both runs have the same options."""
    with RunFolder(tmp_path / "other", CONFIG) as folder:
        folder.claim()
    theirs, ours = saved(tmp_path / "other", 7), saved(output, 5)
    with pytest.raises(RunError, match=r"checkpoint-7.*it is of another run"):
        opened(output, str(theirs))
    shutil.copytree(theirs, output / "checkpoint-7")
    assert opened(output) == Start(str(ours), None)
    assert opened(tmp_path / "other") == Start(str(theirs), None)


def test_old_checkpoints_go_only_behind_the_next_that_is_complete(output: Path) -> None:
    """The newest and the best stay; after going back, those of later updates count as oldest; 0 or none is no limit."""
    for number in (1, 2, 3, 9):
        saved(output, number)
    names = lambda: [path.name for path in checkpoints.folders(output)]  # noqa: E731
    for limit in (None, 0, 4):
        checkpoints.rotate(output / "checkpoint-3", limit, None)
        assert len(names()) == 4
    checkpoints.rotate(output / "checkpoint-3", 3, None)
    assert names() == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]
    checkpoints.rotate(output / "checkpoint-3", 1, "elsewhere/checkpoint-1")
    assert names() == ["checkpoint-3", "checkpoint-1"]


def test_one_run_has_a_folder_at_a_time(output: Path, tmp_path: Path) -> None:
    """A second one is told by whom it is held, whether both go on or both are new; afterwards it may go on."""
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with RunFolder(output, CONFIG) as folder:
        folder.open("true")
        with pytest.raises(RunError, match=f"{output}.*in use by {holder}"):
            opened(output)
    assert opened(output) == Start(None, None)

    new = tmp_path / "new"
    with RunFolder(new, CONFIG) as second:
        with RunFolder(new, CONFIG) as first:
            assert first.open(None) == second.open(None)
            first.claim()
            with pytest.raises(RunError, match=f"in use by {holder}"):
                second.claim()
        with pytest.raises(UsageError, match="an empty or new folder"):
            second.claim()


@pytest.mark.parametrize("left", [[], ["run.lock"], ["run.lock", "run.json.part"]], ids=len)
def test_a_folder_whose_claim_was_cut_short_starts_again(left: list[str], tmp_path: Path) -> None:
    """What a kill leaves at each moment of taking the folder is no obstacle."""
    for name in left:
        (tmp_path / name).write_text("{")
    with RunFolder(tmp_path, CONFIG) as folder:
        assert folder.open(None) == Start(None, None)
        folder.claim()
    assert opened(tmp_path) == Start(None, None)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("learning_rate", "-1"),
        ("adam_beta1", "2"),
        ("lr_scheduler_type", "sawtooth"),
        ("lr_scheduler_kwargs", "[1]"),
        ("optim_args", "rank"),
    ],
)
def test_what_only_the_optimiser_refuses_is_said_before_anything_is_decoded_or_written(
    option: str,
    value: str,
    command: Callable[..., tuple[int, str, str]],
    small_run: list[str],
    random_model: Path,
    tmp_path: Path,
) -> None:
    """Exit status 2, and nothing is in the way of the corrected command."""
    output = tmp_path / "output"
    argv = [*small_run, "--model", str(random_model), "--output_dir", str(output)]
    status, out, err = command(run.main, *argv, f"--{option}", value)
    assert status == 2 and option in err and value in err and err.count("\n") == 1 and not out
    assert not output.exists() or not list(output.iterdir())


def test_a_tensor_that_the_last_update_spoils_is_seen(
    command: Callable[..., tuple[int, str, str]], small_run: list[str], random_model: Path, tmp_path: Path
) -> None:
    """A finite loss, and a step beyond fp32: the run ends with a sentence, and leaves no adapter and no checkpoint."""
    argv = [*small_run, "--model", str(random_model), "--correct_only", "false", "--max_steps", "1"]
    argv += ["--learning_rate", "1e39", "--lr_scheduler_type", "constant", "--output_dir", str(tmp_path / "run")]
    status, _, err = command(run.main, *argv)
    assert status == 1
    for word in ("tensors of the adapter are not finite behind update 1", "no complete checkpoint", "learning_rate"):
        assert word in err
    assert not [*(tmp_path / "run").glob("checkpoint-*"), *(tmp_path / "run").glob("adapter*")]
    assert not (tmp_path / "run" / "report.json").exists()
