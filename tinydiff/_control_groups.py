"""What Linux's control groups leave to this process: the limits of a container, or of a job of a cluster.

A group lies within others, and the limits of all of them count. Version 2 has one tree of groups, version 1
one for each kind of limit. A container sees its own group as the outermost. For no limit, version 2 says
"max", version 1 a number less than 0 or beyond all memory.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

__all__ = ["memory_left", "processors"]

ROOT = Path("/")


def memory_left(root: Path = ROOT) -> list[int]:
    """Bytes that each group with a limit may still take; files that it has read count as free."""
    left = []
    for names in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        for group in _groups("memory", root):
            with suppress(OSError, ValueError):  # there is no such group, or no limit
                limit, used = (int((group / name).read_text()) for name in names)
                left.append(limit - used + _cached(group))
    return left


def processors(root: Path = ROOT) -> int | None:
    """How many processors' time the groups may use, rounded up; None: no limit."""
    found = []
    for group in _groups("cpu", root):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with suppress(OSError, ValueError):
                quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
                if quota > 0:
                    found.append(-(-quota // period))
    return min(found, default=None)


def _cached(group: Path) -> int:
    """Bytes of files that a group has read or written: they count as used, but go when memory is short."""
    found = {}
    with suppress(OSError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, size = line.partition(" ")
            found[name] = size
    # Version 1 has one number for the group alone, and one that counts the groups inside it, as the use does.
    return int(found.get("total_inactive_file", found.get("inactive_file", 0)))


def _groups(kind: str, root: Path) -> list[Path]:
    """The folders of this process' group (version 2's, and version 1's for `kind`) and of those around it."""
    own = {"": Path(), kind: Path()}
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, group = line.split(":", 2)
            for name in own.keys() & kinds.split(","):
                own[name] = Path(group.lstrip("/"))
    mounted = root / "sys/fs/cgroup"
    return [mounted / name / around for name, group in own.items() for around in (group, *group.parents)]
