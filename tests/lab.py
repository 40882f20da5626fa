"A JupyterLab (Notebook 7, Voilà) of one's own on loopback, and a browser that drives it; nothing of it leaves the machine"
import json, os, shutil, signal, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
import nbformat, pytest

chromium = next((p for p in (os.environ.get('CHROMIUM'), *map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))) if p and os.path.exists(p)), None)
flags = '''--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
    --disable-sync --disable-dev-shm-usage'''.split()

def needs_browser():
    "Skip the module where there is no browser, unless PIPA_BROWSER=1 says that there must be one"
    lost = [k for k,ok in dict(playwright=_has('playwright'), jupyterlab=_has('jupyterlab'), chromium=chromium).items() if not ok]
    if not lost: return
    why = f"{' and '.join(lost)} not found: `apt-get install chromium` and `pip install playwright jupyterlab`, or name a browser in CHROMIUM"
    if os.environ.get('PIPA_BROWSER')=='1': raise RuntimeError(f'PIPA_BROWSER=1 asks for tests in a browser, but {why}')
    pytest.skip(why, allow_module_level=True)

def _has(name):
    from importlib.util import find_spec
    return find_spec(name) is not None

def needs(package, name):
    "Skip a test of a front end that isn't installed"
    if not _has(package): pytest.skip(f'{name} is not installed: `pip install {package}`')

def host_of(url): return '{0.scheme}://{0.netloc}'.format(urlsplit(url))

def _port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

# What each front end is started with, and where it shows a notebook
_lab = ['--expose-app-in-browser', '--LabApp.news_url=None', '--LabApp.extension_manager=readonly',
        '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
fronts = dict(jupyterlab=(_lab, 'lab/tree'), notebook=([*_lab, '--JupyterNotebookApp.expose_app_in_browser=True'], 'notebooks'), voila=([], 'voila/render'))

@contextmanager
def server(root, home, front='jupyterlab', timeout=180):
    "Run a front end over folder `root`, with all that it keeps in `home`; gives the address of its notebooks and the token"
    host,port,token = '127.0.0.1',_port(),'let-me-in'
    quiet = home/'settings/@jupyterlab/apputils-extension'; quiet.mkdir(parents=True)
    (quiet/'notification.jupyterlab-settings').write_text(json.dumps(dict(fetchNews='false', checkForUpdates=False)))
    dirs = dict(JUPYTER_CONFIG_DIR='config', JUPYTER_DATA_DIR='data', JUPYTER_RUNTIME_DIR='runtime', IPYTHONDIR='ipython',
                JUPYTERLAB_SETTINGS_DIR='settings', JUPYTERLAB_WORKSPACES_DIR='workspaces')
    env = os.environ | {k:str(home/v) for k,v in dirs.items()} | dict(PYDEVD_DISABLE_FILE_VALIDATION='1',
        PYTHONPATH=os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get('PYTHONPATH', '')]))
    args,where = fronts[front]
    url = f'http://{host}:{port}'
    args = ['--no-browser', '--allow-root', f'--ip={host}', f'--port={port}', '--port-retries=0', f'--IdentityProvider.token={token}',
            f'--ServerApp.root_dir={root}', *args]
    app = ['-m', front] if front!='voila' else ['-m', 'jupyter_server', "--ServerApp.jpserver_extensions={'voila.server_extension':True}"]
    with open(home/'log', 'wb') as log:
        p = subprocess.Popen([sys.executable, *app, *args], env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait(lambda: _answers(f'{url}/api/status?token={token}', p, home/'log'), timeout, f'{front} to answer')
            yield f'{url}/{where}',token
        finally:
            p.send_signal(signal.SIGTERM)
            try: p.wait(20)
            except subprocess.TimeoutExpired: p.kill(); p.wait()

def _answers(url, p, log):
    if p.poll() is not None: raise RuntimeError(f'The server ended: {log.read_text()[-2000:]}')
    try: return urllib.request.urlopen(url, timeout=5).read()
    except OSError: return None

def _wait(f, timeout, what):
    end = time.time()+timeout
    while time.time()<end:
        if v := f(): return v
        time.sleep(.1)
    raise TimeoutError(f'waited {timeout} s for {what}')

def at_panel(page, canvas, panel, x, y, of=0):
    "Where on the screen a share `x`, `y` of an image of a surface is"
    c = page.locator(canvas).nth(of); c.scroll_into_view_if_needed()
    b,(l,t,w,h) = c.bounding_box(),json.loads(c.get_attribute('data-rects'))[panel]
    return b['x']+l+w*x, b['y']+t+h*y

class Notebook:
    "A notebook that is open in the browser"
    def __init__(self, page, url, token, name):
        self.page = page
        page.goto(f'{url}/{name}?reset&token={token}', wait_until='domcontentloaded', timeout=120_000)
        self.until("() => { const c = window.jupyterapp?.shell.currentWidget?.context; return c?.isReady && c.sessionContext.session?.kernel?.status==='idle' }", 180)

    def until(self, js, timeout=60, arg=None): return self.page.wait_for_function(js, arg=arg, timeout=1000*timeout)

    def run(self, timeout=240):
        "Run all cells; gives what went wrong"
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        outs = "[...window.jupyterapp.shell.currentWidget.content.model.cells].filter(c => c.type==='code' && c.sharedModel.getSource().trim())"
        self.until(f"() => {{ const cs = {outs}; return cs.every(c => c.executionCount!==null && c.executionState!=='running')"
                   "|| cs.some(c => c.outputs.toJSON().some(o => o.output_type==='error')) }", timeout)
        return self.page.evaluate(f"() => {outs}.flatMap(c => c.outputs.toJSON()).filter(o => o.output_type==='error').map(o => `${{o.ename}}: ${{o.evalue}}`)")

    def py(self, expr, timeout=60):
        "The value of a Python expression in the kernel"
        code = f"import json as _j; print('<<'+_j.dumps({expr}, default=lambda o: o.item() if hasattr(o, 'item') else str(o))+'>>')"
        out = self.page.evaluate('''async ([code, ms]) => {
            const f = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code, store_history: false});
            let s = ''; f.onIOPub = m => { s += m.content.text || (m.content.ename ? `!!${m.content.ename}: ${m.content.evalue}` : '') };
            await Promise.race([f.done, new Promise((_, no) => setTimeout(() => no(new Error('the kernel is silent')), ms))]); return s }''', [code, 1000*timeout])
        if '<<' not in out: raise RuntimeError(out)
        return json.loads(out[out.index('<<')+2:out.rindex('>>')])

    def wait(self, expr, timeout=30):
        "Ask the kernel again and again, until `expr` is true"
        return _wait(lambda: self.py(expr), timeout, f'`{expr}`')

    def at(self, canvas, panel, x, y, of=0):
        "See `at_panel`"
        return at_panel(self.page, canvas, panel, x, y, of)

    def drag(self, points, steps=8):
        "Press the mouse at the first point, and let it go at the last"
        m = self.page.mouse
        m.move(*points[0]); m.down()
        for p in points[1:]: m.move(*p, steps=steps)
        m.up()

def write_notebook(file, *cells):
    meta = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    nbformat.write(nbformat.v4.new_notebook(metadata=meta, cells=[nbformat.v4.new_code_cell(c) for c in cells]), file)
