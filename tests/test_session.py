"""What asks a run to stop, and what is looked at before it starts."""

import errno
import os
import shutil
import signal

import pytest

from webssl_jax import cli, workdirs
from webssl_jax import config as configs
from webssl_jax.config import TransientError, UserError
from webssl_jax.session import Session, _StopRequest


@pytest.fixture
def handlers():
    """Those of the tests come back afterwards."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def session_of(workdir):
    """A session that has opened ``workdir``, with no processes and time limits."""
    session = object.__new__(Session)
    workdir.mkdir()
    session._workdir, session._lock = workdir, workdirs.WorkdirLock(workdir)
    (workdir / "run_id").write_text("me")
    session._identity = {workdir / "run_id": b"me"}
    return session


def test_a_closed_terminal_asks_for_a_stop_unless_the_run_was_told_to_ignore_it(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    request = _StopRequest(lambda: "")
    os.kill(os.getpid(), signal.SIGHUP)
    assert request.received(1) == ""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    request = _StopRequest(lambda: "")
    os.kill(os.getpid(), signal.SIGHUP)
    assert request.received(1) == "SIGHUP"


def test_a_lost_log_asks_for_a_stop(handlers, tmp_path, monkeypatch):
    request = _StopRequest(session_of(tmp_path / "run")._trouble)
    assert request.received(1) == ""
    request._looked = float("-inf")
    log = cli.Stream(open("/dev/full", "w"))
    print("lost", file=log, flush=True)
    monkeypatch.setattr("sys.stderr", log)
    assert request.received(2) == "the loss of its log (No space left on device)"


def test_a_workdir_that_is_removed_is_made_again_for_a_last_save(tmp_path):
    workdir = tmp_path / "deep" / "run"
    (tmp_path / "deep").mkdir()
    session = session_of(workdir)
    assert session._trouble() == ""
    shutil.rmtree(tmp_path / "deep")
    assert session._trouble().startswith(f"the removal of {workdir}")
    assert workdirs.run_id(workdir) == "me" and session._trouble() == ""
    with pytest.raises(UserError, match="is using this workdir"):
        workdirs.WorkdirLock(workdir)


def test_nothing_is_made_where_another_run_is_by_now_or_a_disk_was_mounted(tmp_path):
    workdir = tmp_path / "run"
    session = session_of(workdir)
    shutil.rmtree(workdir)
    workdir.mkdir()
    other = workdirs.WorkdirLock(workdir)
    (workdir / ".lock").write_text("1\n")  # its own number
    with pytest.raises(UserError, match=r"another run \(process 1\) is using this workdir"):
        session._trouble()
    assert [path.name for path in workdir.iterdir()] == [".lock"]
    other.release()
    shutil.rmtree(workdir)
    session._lock._device += 1
    with pytest.raises(TransientError, match="not mounted any more"):
        session._trouble()
    assert not workdir.exists()


@pytest.mark.parametrize("key", ["--workdir", "checkpoint.local_folder", "host.compilation_cache"])
def test_a_folder_that_cannot_be_written_is_named_at_the_start(tmp_path, key):
    config = configs.load("configs/web_mae.py:size=tiny")
    workdirs.check_writable(tmp_path / "new", config)
    (tmp_path / "closed").symlink_to("/proc/self")  # also of root
    if key == "--workdir":
        (tmp_path / "checkpoints").symlink_to("/proc/self")
    else:
        config.update_from_flattened_dict({key: str(tmp_path / "closed")})
    with pytest.raises(UserError, match=f"{key}: nothing can be written in {tmp_path}"):
        workdirs.check_writable(tmp_path, config)
    assert not list(tmp_path.rglob(".writable*"))


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_disk_that_fails_at_a_later_start_may_come_back(tmp_path, monkeypatch, begun, code):
    """Exit code 75. A new run, and one that has no permission, are for their user to mend: 2."""
    if begun:
        (tmp_path / "config.json").write_text("{}")

    def fail(folder):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(workdirs, "try_writing", fail)
    with pytest.raises(UserError, match="nothing can be written in") as caught:
        workdirs.check_writable(tmp_path, configs.load("configs/web_mae.py:size=tiny"))
    assert isinstance(caught.value, TransientError) == (begun and code == errno.EROFS)
