"""The limits of a container: files that stand for Linux's control groups, of either version."""

import pytest

from tinydiff import _control_groups
from tinydiff.kernels import _threads


@pytest.fixture(scope="module", autouse=True)
def blas_threads():
    """As many as BLAS finds, or seems to."""


def write(root, folder, **files):
    group = root / "sys/fs/cgroup" / folder
    group.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (group / name.replace("__", ".")).write_text(f"{text}\n")


def is_in(root, lines):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)


def test_nothing_is_limited_where_there_are_no_groups(tmp_path):
    assert _control_groups.memory_left(tmp_path) == []
    assert _control_groups.processors(tmp_path) is None


@pytest.mark.parametrize("limited", ["slurm/job_1/step", "slurm/job_1", "slurm", "."])
def test_a_limit_on_any_group_around_this_process_counts(tmp_path, limited):
    """A job of a cluster, or what systemd-run starts, is in a group below the mounted one."""
    is_in(tmp_path, "1:name=systemd:/\n0::/slurm/job_1/step\n")
    for group in ("slurm/job_1/step", "slurm/job_1", "slurm", "."):
        here = group == limited
        write(tmp_path, group, memory__max=10**6 if here else "max", memory__current=250000)
        write(tmp_path, group, cpu__max="200000 100000" if here else "max 100000")
    assert _control_groups.memory_left(tmp_path) == [750000]
    assert _control_groups.processors(tmp_path) == 2


@pytest.mark.parametrize("limited", ["docker/1", "docker", "."])
@pytest.mark.parametrize("seen", [True, False])  # a container does not see the groups that its paths name
def test_a_limit_on_a_group_of_version_1_counts(tmp_path, limited, seen):
    is_in(tmp_path, "5:cpuset:/a\n4:cpu,memory:/docker/1\n1:name=systemd:/a:b\n0::/\n")
    for group in ("docker/1", "docker", ".") if seen else ".":
        here = group == limited or not seen
        limit, quota = (10**6, 200000) if here else (9223372036854771712, -1)
        write(tmp_path, f"memory/{group}", memory__limit_in_bytes=limit, memory__usage_in_bytes=250000)
        write(tmp_path, f"cpu/{group}", cpu__cfs_quota_us=quota, cpu__cfs_period_us=100000)
    assert min(_control_groups.memory_left(tmp_path)) == 750000
    assert _control_groups.processors(tmp_path) == 2


@pytest.mark.parametrize(("quota", "count"), [(1000, 1), (50000, 1), (100000, 1), (150000, 2), (400000, 4)])
def test_a_processor_of_which_there_is_a_part_counts(tmp_path, quota, count):
    write(tmp_path, ".", cpu__max=f"{quota} 100000")
    assert _control_groups.processors(tmp_path) == count


@pytest.mark.parametrize(
    ("folder", "limit", "used", "stat"),
    [
        (".", "memory.max", "memory.current", "anon 200000\ninactive_file 700000\nactive_file 50000"),
        (
            "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "inactive_file 10\ntotal_inactive_file 700000",
        ),
    ],
)
def test_files_that_a_group_has_read_leave_their_memory_free(tmp_path, folder, limit, used, stat):
    """What has read a large data set has used up its limit, and the system takes that back when asked."""
    write(tmp_path, folder, **{limit: 1000000, used: 950000, "memory.stat": stat})
    assert _control_groups.memory_left(tmp_path) == [750000]


@pytest.mark.parametrize(("of_blas", "may", "threads"), [(64, 2, 2), (4, 8, 4), (4, None, 4)])
def test_no_more_threads_than_a_container_may_run(of_blas, may, threads, monkeypatch):
    monkeypatch.setattr(_threads, "_blas", (lambda: of_blas, lambda n: None))
    monkeypatch.setattr(_threads, "processors", lambda: may)
    monkeypatch.setattr(_threads, "_most_threads", _threads._most_threads.__wrapped__)
    assert _threads.threads_in_reach() == threads
    with _threads.blas_on_one_thread():
        assert _threads.threads_in_reach() == threads
