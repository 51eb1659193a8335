"""A run's folder.

results.json           settings, environment, accuracies, step costs: everything in the tables
epochs.csv             loss and accuracies of every epoch of every seed
seed-N/                the checkpoint of each seed, see `rada.checkpoint`; of other methods than rada in seed-N/METHOD
examples/              images, rational matrices and masks of the report, see `rada.examples`
tensorboard/           event files, on request
resume/                the states of a run that was stopped
figures/, index.html   the report, drawn from the files above by `rada.report`
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rada.checkpoint import seed_folders
from rada.checks import check_same
from rada.files import check_folder, read_json, write_text

RESULTS, EPOCHS, PAGE = "results.json", "epochs.csv", "index.html"
EXAMPLES, FIGURES, TENSORBOARD, RESUME = "examples", "figures", "tensorboard", "resume"
FORMAT = "rada-run"
FORMAT_VERSION = 3  # of results.json


def load_results(folder: Path) -> dict:
    """The stored results of a run. Raises FileNotFoundError or ValueError for a folder without a run of this format."""
    return read_json(Path(folder) / RESULTS, "the results of a run", FORMAT, FORMAT_VERSION)


def write_epochs(folder: Path, rows: Sequence[dict]) -> None:
    """Write the epochs' numbers as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / EPOCHS, text.getvalue())


def check_output(output: Path, overwrite: bool, resume: bool = False, settings: dict | None = None) -> None:
    """Raise FileExistsError unless a run may be written to the folder `output`.

    resume: it holds a run of the same settings that is not complete. Raises ValueError naming the setting that differs.
    """
    if resume and overwrite:
        raise ValueError("overwrite: got it with resume; it takes one of the two")
    if resume:
        stored = load_results(output)
        if stored["status"] == "complete":
            raise FileExistsError(f"resume: the run in {output} is complete; it takes one that was stopped")
        check_same(json.loads(json.dumps(settings)), stored["settings"], f"the run to resume in {output}")
        return
    if not output.exists():
        check_folder(output)
        return
    if not output.is_dir():
        raise FileExistsError(f"output: {output} is a file; it takes a folder")
    if (output / RESULTS).is_file():
        if not overwrite:
            raise FileExistsError(
                f"output: {output} already holds a run; --overwrite replaces it, or give another folder"
            )
    elif any(output.iterdir()):
        raise FileExistsError(f"output: {output} holds other files than a run's; it takes a new or an empty folder")


@contextmanager
def folder_for(output: Path) -> Iterator[Path]:
    """The folder for a run: `output`, or, if that holds a run already, a new one beside it.

    When the block ends, the new run takes the old one's place in `output`, whose other files stay. After an error or
    Ctrl-C the old run is as it was; the new one's finished seeds stay in its folder, named in a warning.
    """
    if not (output / RESULTS).is_file():
        yield output
        return
    whole = output.resolve()
    folder = free_output(whole.with_name(f"{whole.name}-new"))
    try:
        yield folder
    except BaseException:
        if seed_folders(folder):
            warnings.warn(f"output: the run in {output} is as it was; the new one's finished seeds are in {folder}",
                          stacklevel=3)  # fmt: skip
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    _remove_run(whole)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RESULTS):  # its mark as a run comes last
        shutil.move(path, whole / path.name)
    folder.rmdir()


def run_name(source: str) -> str:
    """The name of a run on a data set: photos, of folder:path/to/photos."""
    return Path(source.partition(":")[2] or source).resolve().stem


def free_output(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that does not exist."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _remove_run(output: Path) -> None:
    """Remove the files of a run, and no others."""
    for path in (*output.glob("seed-*"), *(output / name for name in (EXAMPLES, FIGURES, TENSORBOARD, RESUME))):
        if path.is_dir():
            shutil.rmtree(path)
    for name in (RESULTS, EPOCHS, PAGE):
        (output / name).unlink(missing_ok=True)
