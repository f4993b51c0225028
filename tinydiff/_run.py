"""The files of a training: its metrics as they come, and checkpoints from which it goes on.

A directory belongs to one run. The files of a finished run are replaced once the first step of a new one has
succeeded; an unfinished run has to be continued, or deleted by hand. While a process trains there it holds a
lock on the directory (on Windows, on a file there), which the system releases when the process ends.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinydiff.checkpoint import (
    load_arrays,
    naming,
    patiently,
    remove_unfinished,
    replace_file,
    save_arrays,
)

__all__ = ["Run", "Stateful", "load_states", "states_of"]


class Stateful(Protocol):
    """What has a state to save: arrays on the host, by name."""

    def state_dict(self) -> dict[str, np.ndarray]: ...

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None: ...


def states_of(parts: Mapping[str, Stateful]) -> dict[str, np.ndarray]:
    """The states of all parts in one: each name with the key of its part in front."""
    return {
        f"{prefix}{name}": array
        for prefix, part in parts.items()
        for name, array in part.state_dict().items()
    }


def load_states(parts: Mapping[str, Stateful], state: Mapping[str, np.ndarray]) -> None:
    """The other way: each part is given what begins with its prefix; the rest is ignored."""
    for prefix, part in parts.items():
        own = {name: array for name, array in state.items() if name.startswith(prefix)}
        part.load_state_dict({name.removeprefix(prefix): array for name, array in own.items()})


# What older checkpoints leave out: when they were written there was only one loss, and there were no labels.
SIMPLE: dict[str, Any] = dict(
    loss="simple",
    min_snr_gamma=None,
    variance=None,
    decoder=None,
    importance_sampling=False,
    labels=None,
    label_dropout=None,
)

# What a line of metrics holds, in this order, and how it begins.
KEYS = ["step", "loss", "grad_norm", "lr", "seconds"]
LINE = b'{"step": '

LOCK = ".lock"  # the file that is locked on Windows, where a directory cannot be


class Run:
    """The files of a run: ``metrics.jsonl`` and ``checkpoint.safetensors``.

    Parameters
    ----------
    directory : Path
        Where they are; made if it is missing.
    settings : dict
        What the run depends on; another run with the same settings goes on where this one stopped. (A
        checkpoint has ``betas`` from `about`, which has to say them if they are among the settings.)
    states : mapping of str to Stateful
        What a checkpoint holds, by the prefix of its arrays' names. One with the prefix "" is given all
        arrays, and picks its own.
    about : callable
        ``about()`` is what else a checkpoint's metadata says, for whoever reads it.

    Raises
    ------
    TypeError
        If JSON cannot hold one of `settings`; the message names it.
    """

    def __init__(
        self,
        directory: Path,
        settings: dict[str, Any],
        states: Mapping[str, Stateful],
        about: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.checkpoint = directory / "checkpoint.safetensors"
        self.metrics = directory / "metrics.jsonl"
        self.settings = _as_json(settings)
        self.states = states
        self.about = about
        self.directory = directory
        self.began = time.perf_counter()
        self._begun = False
        self._lock: int | None = None

    def start(self, resume: bool) -> list[float]:
        """Take up the checkpoint if there is one to take up; return the losses so far."""
        if self.directory.is_dir():
            self._lock = _locked(self.directory)  # refuses a directory in use before any advice to delete it
            self.end()
        elif self.directory.exists():
            raise NotADirectoryError(f"run_dir is {self.directory}, which is not a directory.")
        losses: list[float] = []
        self._found = _stamp(self.checkpoint)
        if self._found is not None:
            arrays, metadata = load_arrays(self.checkpoint)
            if not _is_checkpoint(arrays, metadata):
                raise ValueError(f"{self.checkpoint} is not a checkpoint of tinydiff's training.")
            if resume:
                self._check_settings(metadata)
                losses = self._restore(arrays)
            elif metadata["step"] < metadata["settings"]["steps"]:
                raise ValueError(
                    f"{self.checkpoint} is an unfinished run (step {metadata['step']} of "
                    f"{metadata['settings']['steps']}): pass resume=True (--resume) to continue it, choose "
                    "another directory, or delete it to begin again."
                )
        self._before = [line for line in self._lines() if line["step"] <= len(losses)]
        self._resumed = bool(losses)
        if self._before:
            self.began -= self._before[-1]["seconds"]
        return losses

    def begin(self) -> None:
        """Take the directory over, once a first step has succeeded: the files of a finished run are replaced.

        No other run can take it until `end`. ValueError if another has it, or has written a checkpoint since
        `start`.
        """
        if self._begun:
            return
        self._lock = _locked(self.directory)
        if _stamp(self.checkpoint) != self._found:
            raise ValueError(
                f"{self.checkpoint} has changed since this run looked at it, so another training was here "
                "meanwhile: choose another directory, or start again."
            )
        if self._lock is not None:
            for path in (self.checkpoint, self.metrics):
                remove_unfinished(path)
        replace_file(self.metrics, "".join(json.dumps(line) + "\n" for line in self._before).encode())
        if not self._resumed:
            patiently(self.checkpoint.unlink, missing_ok=True)
        self._begun = True

    def end(self) -> None:
        """Leave the directory to others."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            if sys.platform == "win32":
                with suppress(OSError):  # another run, which asks for the lock, has it open
                    (self.directory / LOCK).unlink()

    def _lines(self) -> list[dict[str, Any]]:
        """The lines of metrics there are; a crash may have left the last one incomplete."""
        texts = self.metrics.read_bytes().splitlines() if self.metrics.exists() else []
        texts = [text for text in texts if text.strip()]
        lines = []
        for i, text in enumerate(texts, 1):
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if line is None and i == len(texts) and LINE.startswith(text[: len(LINE)]):
                break
            if not _is_ours(line):
                raise ValueError(f"{self.metrics} is not tinydiff's: choose another directory, or move it.")
            lines.append(line)
        return lines

    def _check_settings(self, metadata: Mapping[str, Any]) -> None:
        """ValueError unless going on gives the run that these settings would have given from its start."""
        before = SIMPLE | _as_json(metadata["settings"]) | {"betas": metadata.get("betas")}
        changed = [k for k, v in self.settings.items() if _differ(k, before.get(k), v)]
        may_become_longer = self.settings["final_lr"] == 1 and self.settings["steps"] >= metadata["step"]
        if changed == ["steps"] and may_become_longer:
            return  # the rate of no step depends on how many there are
        if changed:
            what = ", ".join(f"{k} was {_said(before.get(k))}, is {_said(self.settings[k])}" for k in changed)
            raise ValueError(
                f"{self.checkpoint} belongs to a run with other settings ({what}): resume with the same "
                "settings (of a run with final_lr=1 and the same warmup the steps may become more), or "
                "choose another directory."
            )

    def _restore(self, arrays: dict[str, np.ndarray]) -> list[float]:
        try:
            load_states(self.states, arrays)
        except (KeyError, ValueError) as error:  # the settings do not tell all models apart
            raise ValueError(f"{self.checkpoint} does not hold the state of this model: {error}") from None
        return [float(loss) for loss in arrays["losses"]]

    def save(self, losses: list[float]) -> None:
        """Write the whole state of the run."""
        arrays = {"losses": np.asarray(losses), **states_of(self.states)}
        settings = {name: value for name, value in self.settings.items() if name != "betas"}
        metadata = {**self.about(), "step": len(losses), "settings": settings}
        save_arrays(self.checkpoint, arrays, metadata)

    def log(self, step: int, losses: list[float], grad_norm: float, lr: float) -> None:
        """Append a line of metrics; the loss is the mean since the line before."""
        seconds = round(time.perf_counter() - self.began, 3)
        line = dict(zip(KEYS, [step, float(np.mean(losses)), grad_norm, float(lr), seconds], strict=True))
        with naming(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _is_checkpoint(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> bool:
    """Whether it has what `Run.save` writes; metadata that is damaged is read as text."""
    settings = metadata.get("settings")
    if "losses" not in arrays or not isinstance(settings, dict):
        return False
    return type(metadata.get("step")) is int and type(settings.get("steps")) is int


def _is_ours(line: Any) -> bool:
    """Whether it is a line that `Run.log` writes."""
    numbers = isinstance(line, dict) and all(type(number) in (int, float) for number in line.values())
    return numbers and list(line) == KEYS and type(line["step"]) is int


def _differ(name: str, before: Any, now: Any) -> bool:
    """Whether a setting has changed; betas and the data's moments by more than rounding.

    Another processor, or NumPy's next version, may round a cosine differently. Of moments both must be known.
    """
    if name == "betas":
        return np.shape(before) != np.shape(now) or not np.allclose(before, now, rtol=1e-6, atol=0)
    if name != "data_mean_and_rms":
        return bool(before != now)
    return None not in (before, now) and math.dist(before, now) > 1e-4 * now[1]


def _said(value: Any) -> str:
    """A setting as a message shows it: of a long list its ends and how many numbers it has."""
    if isinstance(value, list) and len(value) > 8:
        return f"[{value[0]!r}, ..., {value[-1]!r}] ({len(value)} numbers)"
    return repr(value)


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a checkpoint gives them back, so that two compare alike: nan and infinity as words."""
    held = {}
    for name, value in settings.items():
        try:
            held[name] = json.loads(json.dumps(value), parse_constant=str)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} is {value!r}; expected what JSON can hold ({error}).") from None
    return held


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when another file is moved to this path; None if there is no file."""
    try:
        about = path.stat()
    except FileNotFoundError:
        return None
    return about.st_ino, about.st_mtime_ns


def _locked(directory: Path) -> int | None:
    """A locked descriptor of `directory`, or of its `LOCK`; ValueError if another has the lock.

    None where there are no such locks: in a browser, and on some file systems.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        descriptor = patiently(os.open, directory / LOCK, os.O_RDWR | os.O_CREAT)
    else:
        descriptor = os.open(directory, os.O_RDONLY)
    try:
        _lock(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"{directory} belongs to a training that is still running: choose another directory, or wait."
        ) from None
    except (ImportError, OSError):
        os.close(descriptor)
        return None
    return descriptor


def _lock(descriptor: int) -> None:
    """Lock it as long as it is open; BlockingIOError if another has it, OSError where there are no locks."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 2**30, os.SEEK_SET)  # past the end: others cannot read what is locked
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise
            raise BlockingIOError from None  # Windows says EACCES; Wine, whatever was said before
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
