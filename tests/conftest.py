"The same surroundings for everybody: one thread a process, no window, nothing from the net."
import os, socket, sys
from pathlib import Path
import pytest

for k,v in dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', MPLBACKEND='Agg', HF_HUB_OFFLINE='1').items(): os.environ.setdefault(k, v)


def pytest_xdist_auto_num_workers(config):
    "One process a core, but none to spare for a single file or name: starting them takes longer than most tests"
    few = any(getattr(config.option, k, None) for k in ('keyword', 'lf', 'usepdb')) or any(o.endswith('.py') or '::' in o for o in config.args)
    return 0 if few else min(os.cpu_count() or 1, 8)


# Tests ask the net for nothing: connections of this process end at this machine, which the tests in a browser need.
def _here(host): return host in (None, '', 'localhost', '0.0.0.0', '::', socket.gethostname()) or str(host).startswith(('127.', '::1'))

def _guarded(name, host_of):
    real = getattr(socket.socket if name.startswith('connect') else socket, name)
    def f(*args, **kwargs):
        host = host_of(*args)
        if not _here(host.decode() if isinstance(host, bytes) else host): raise RuntimeError(f'a test asks the network for {host!r}')
        return real(*args, **kwargs)
    return f

for name in ('connect', 'connect_ex'): setattr(socket.socket, name, _guarded(name, lambda s,a,*_: a[0] if isinstance(a, tuple) else None))
socket.getaddrinfo = _guarded('getaddrinfo', lambda host=None,*_: host)


# Counts of classes and drawn cities are cached in the user's home; those of a test shall lie elsewhere, and none of an earlier run be found.
@pytest.fixture(scope='session')
def shared(tmp_path_factory):
    "A folder that all processes of this run share: what lies in it is named by its content, and put there whole"
    at = tmp_path_factory.getbasetemp()
    at = (at.parent if 'PYTEST_XDIST_WORKER' in os.environ else at)/'shared'; at.mkdir(exist_ok=True)
    return at

@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    "A cache for this test alone"
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))

@pytest.fixture(scope='module')
def cache_home(tmp_path_factory):
    "A cache that the tests of a file share"
    with pytest.MonkeyPatch.context() as m: m.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('xdg'))); yield

@pytest.fixture
def placed(monkeypatch):
    "Files that came to their place by renaming: whole, or not there"
    real,seen = os.replace,set()
    def note(a, b): seen.add(Path(b).absolute()); return real(a, b)
    monkeypatch.setattr(os, 'replace', note)
    return seen

@pytest.fixture(scope='session', autouse=True)
def may_fork():
    "PyTorch decides at the first gradient of a process whether its forks may have gradients, too; after an export it decides that they may not"
    if (torch := sys.modules.get('torch')): torch.ones(1, requires_grad=True).sum().backward()

@pytest.fixture(scope='module', autouse=True)
def own_settings(request):
    "Runs of tests have the settings that they name; those that the recipe finds are tested in a file of their own"
    with pytest.MonkeyPatch.context() as m:
        o = sys.modules.get('pipa.recipe')
        if o and request.module.__name__!='test_recipe': m.setattr(o, '_own', lambda o: True)
        yield
