"Processes of their own that begin at once: forked from a server that has loaded what takes seconds to import"
import multiprocessing as mp, os, runpy, sys, tempfile
from pathlib import Path
from subprocess import CompletedProcess

# The server hasn't fastai, which changes how tensors compare, nor anything of ours: who doesn't import them shall not feel them.
server = mp.get_context('forkserver')
server.set_forkserver_preload('''torch torchvision.transforms.v2 matplotlib.pyplot nbdev.test pandas scipy.stats scipy.io sklearn.model_selection
    seaborn fastprogress.fastprogress plum requests ipywidgets anywidget safetensors.torch'''.split())

def forked(f, *args, timeout=300):
    "Call `f`, a function of a module, in a process of its own; gives its exit code, or None if it takes too long"
    p = server.Process(target=f, args=args); p.start(); p.join(timeout)
    if p.is_alive(): p.kill(); p.join(); return None
    return p.exitcode

def say_to(out, err=None):
    "What this process and its children print goes to files"
    for n,o in ((1, out), (2, err or out)):
        fd = os.open(o, os.O_WRONLY|os.O_CREAT|os.O_APPEND); os.dup2(fd, n); os.close(fd)
    mp.set_start_method('fork', force=True)   # what a process of a user has; this one comes from a server

def _script(home, file, args, cwd, env):
    say_to(f'{home}/out', f'{home}/err')
    os.environ.update(env); os.chdir(cwd)
    sys.argv,sys.path[0] = [file, *args],str(Path(file).parent)
    runpy.run_path(file, run_name='__main__')

def python(file, *args, cwd='.', timeout=300, **env):
    "What `subprocess.run` gives for a Python script, without the seconds that importing takes"
    with tempfile.TemporaryDirectory() as home:
        code = forked(_script, home, str(file), [*map(str, args)], str(cwd), {k:str(v) for k,v in env.items()}, timeout=timeout)
        if code is None: raise TimeoutError(f'{file} ran for more than {timeout} s')
        out,err = (Path(home, o).read_text(errors='replace') if Path(home, o).exists() else '' for o in ('out', 'err'))
    return CompletedProcess([str(file), *args], code, out, err)
