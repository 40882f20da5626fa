"Widgets and tutorials in a real JupyterLab (Notebook 7, Voilà), driven by mouse and keys"
import shutil, statistics
from pathlib import Path
import pytest
from lab import chromium, flags, at_panel, host_of, needs, needs_browser, server, Notebook, write_notebook

needs_browser()
from playwright.sync_api import sync_playwright, TimeoutError as PlaywrightTimeout
root = Path(__file__).resolve().parents[1]

arrays = '''import numpy as np
from pipa.look.views import views
from pipa.widgets import PixelEmbeddingExplorer
rng = np.random.default_rng(0)
y = np.repeat(np.repeat(np.arange(8).reshape(2,4)%3, 8, 0), 8, 1)[None].repeat(3, 0)
images = np.uint8(80*y[...,None]+rng.integers(0, 60, (3,16,32,3)))
mu = rng.normal(size=(3,8))
def look(noise): return views(images, mu[y]+noise*rng.normal(size=(3,16,32,8)), y, (y+(rng.random(y.shape)<.1))%3, rng.random(y.shape), ['game','game','real'])
page = PixelEmbeddingExplorer({'before': look(2.), 'after': look(.4)}, n=30)
page'''

crops = '''import numpy as np, torch
from pipa.widgets import PatchConsistency
x = torch.from_numpy(np.random.default_rng(0).normal(size=(2,3,64,128))).float().cumsum(3)/6
def net(x): return (x.mean(1, keepdim=True)*torch.tensor([-3.,3]).view(1,2,1,1)).softmax(1), torch.nn.functional.avg_pool2d(x, 8)
pairs = PatchConsistency(net, x, size=(32,64), at_1=(16,20), at_2=(24,44), conf=.5)
pairs'''

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    home,work = tmp_path_factory.mktemp('lab'),tmp_path_factory.mktemp('checkout')/'nbs/tutorials'
    work.mkdir(parents=True); (work.parents[1]/'data').symlink_to(root/'data')   # a tutorial reads tables
    with server(work, home) as (url,token): yield url,token,work,home

@pytest.fixture(scope='module')
def browser():
    with sync_playwright() as pw:
        b = pw.chromium.launch(executable_path=chromium, args=flags)
        yield b
        b.close()

@pytest.fixture
def opened(lab, browser, request):
    "Open a notebook of given cells (or a file) and run it; nothing may be asked of another machine, and no script may fail"
    url,token,work,home = lab
    host = host_of(url)
    ctx,bad,books = browser.new_context(viewport=dict(width=1300, height=1000), accept_downloads=False),[],[]
    page = ctx.new_page()
    page.on('pageerror', lambda e: bad.append(f'script: {e}'))
    page.on('request', lambda r: r.url.startswith((host, host.replace('http', 'ws'), 'data:', 'blob:')) or bad.append(f'outside: {r.url}'))
    def f(*cells, errors=()):
        name = f'{request.node.name}.ipynb'
        if isinstance(cells[0], Path): shutil.copy(cells[0], work/name)
        else: write_notebook(work/name, *cells)
        books.append(nb := Notebook(page, url, token, name))
        assert nb.run()==list(errors)
        return nb
    yield f
    for nb in books: nb.page.evaluate('() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()')
    ctx.close()
    assert not bad, bad

def test_pixel_explorer(opened):
    nb = opened(arrays)
    images,points = nb.page.locator('.pipa-images'),nb.page.locator('.pipa-points')
    images.wait_for(); points.wait_for()
    nb.page.mouse.click(*nb.at('.pipa-images', 0, .1, .2))
    assert nb.wait('page.queries')==[[0,3,3,1]]
    before = images.screenshot()
    nb.page.keyboard.down('Shift'); nb.page.mouse.click(*nb.at('.pipa-images', 2, .9, .9)); nb.page.keyboard.up('Shift')
    assert nb.wait('len(page.queries)==2') and nb.py('page.queries[1]')==[2,14,28,-1]
    nb.until("() => document.querySelector('.pipa-said').textContent.includes('similarity')")
    assert images.screenshot()!=before
    images.focus(); nb.page.keyboard.press('Backspace'); nb.wait('len(page.queries)==1')
    nb.page.keyboard.press('ArrowRight'); nb.page.keyboard.press('Enter'); nb.wait('page.queries[0][2]==29 or page.queries[0][2]==4')
    b = points.bounding_box(); corner = lambda x,y: (b['x']+x*b['width'], b['y']+y*b['height'])
    nb.drag([corner(.01,.01), corner(.99,.01), corner(.99,.99), corner(.01,.99)])
    nb.wait('len(page.lit)==len(page.table)')
    nb.page.keyboard.press('Escape'); nb.wait('not page.lit')
    nb.drag([nb.at('.pipa-images', 1, .02, .02), nb.at('.pipa-images', 1, .6, .9)])
    nb.wait("len(page.lit)>5 and (page.selection.image==1).all()")
    nb.page.locator('.pipa-chip[data-name="class 1"]').click(); nb.wait('1 not in page.shown and len(page.shown)==2')
    names = nb.page.locator('.noUi-handle').evaluate_all("es => es.map(e => e.getAttribute('aria-label'))"); assert all(names) and {'opacity', 'heat', 'similar from'}<=set(names)
    handle = nb.page.locator('.pipa-checkpoint [role=slider], .pipa-checkpoint .noUi-handle').first
    handle.focus(); nb.page.keyboard.press('ArrowLeft'); nb.wait('page.checkpoint==0')
    assert nb.py("page.surface.caption").startswith('PCA')

@pytest.mark.slow
def test_hover_asks_and_leaves(opened):
    nb = opened(arrays)
    nb.page.mouse.move(*nb.at('.pipa-images', 1, .3, .3)); nb.wait('len(page.surface.heat)==3*16*32 and not page.queries')
    nb.page.mouse.move(5, 5); nb.wait('len(page.surface.heat)==0')

def test_crops_are_dragged_and_nudged(opened):
    nb = opened(crops)
    canvas = nb.page.locator('.pipa-images').first; canvas.wait_for()
    frames = lambda: int(nb.page.locator('.pipa-surface').first.get_attribute('data-frames'))
    n = frames()
    nb.drag([nb.at('.pipa-images', 0, 22/128, 18/64), nb.at('.pipa-images', 0, (22+11)/128, (18-9)/64)], steps=30)
    nb.wait('pairs.at_1==(8,28)')
    assert frames()-n>=10, 'the box follows the mouse without waiting for Python'
    assert nb.py('pairs.surface.done')>=2
    canvas.focus(); nb.page.keyboard.press('ArrowRight'); nb.wait('pairs.at_1==(8,36)')
    nb.page.keyboard.press('b'); nb.page.keyboard.press('ArrowUp'); nb.wait('pairs.at_2==(16,44)')
    nb.drag([nb.at('.pipa-images', 0, (44+64)/128, (16+32)/64), nb.at('.pipa-images', 0, (44+48)/128, (16+40)/64)]); nb.wait('pairs.size==(40,48)')
    nb.page.locator('.pipa-random').click(); nb.wait('pairs.seed==1')
    nb.page.locator('.lm-TabBar-tab', has_text='over overlap').click(); nb.wait("any(k[0]=='sweep' for k in pairs.cache)", 60)

# A net that ends in a 1×1 convolution, folders of pictures, and a file of clicks
pen = '''import numpy as np, torch
from pathlib import Path
from PIL import Image
from torch import nn
from pipa.data import folder, uda_dls
from pipa.learner import uda_learner
from pipa.models import adapt
from pipa.widgets import PixelEmbeddingExplorer
rng,home = np.random.default_rng(0),Path(HOME)
def save(file, a): file.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(a).save(file)
for k,n in dict(source=4, target=8).items():
    for i in range(n):
        y = np.uint8(np.kron(rng.integers(0, 3, (4,8)), np.ones((32,32))))
        save(home/k/'images'/f'{i}.png', np.uint8(80*y[...,None]+rng.integers(0, 60, (128,256,3)))); save(home/k/'labels'/f'{i}.png', y)
codes = ['road', 'car', 'sky']
torch.manual_seed(0)
net = adapt(nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 3, 1)), '1')
dls = uda_dls(folder(home/'source/images', home/'source/labels', codes), folder(home/'target/images', None, codes), bs=2, size=(64,128), seed=0)
page = PixelEmbeddingExplorer(uda_learner(dls, net), clicks=home/'clicks.csv', n_images=8, n=10)
page'''
def town(folder): return f'HOME = {str(folder)!r}',pen
kinds = "() => [...window.jupyterapp.shell.currentWidget.content.model.cells].map(c => c.type)"
rows = "[o[:4] for o in page.pen.clicks]"

def test_keys_leave_the_notebook_alone(opened):
    nb = opened(arrays); nb.page.locator('.pipa-images').wait_for(); before = nb.page.evaluate(kinds)
    for what in ('.pipa-images', '.pipa-points', '.pipa-chip >> nth=3'):
        nb.page.locator(what).first.focus()
        for k in 'abcdefhijklmnopqrstuvwxyz0123456789': nb.page.keyboard.press(k)
        nb.page.keyboard.press('m'); nb.page.keyboard.press('0'); nb.page.keyboard.press('0')
        assert nb.page.evaluate(kinds)==before and not nb.page.locator('.jp-Dialog').count(), what
    assert nb.page.locator('.pipa-images').is_visible()

def test_pen(opened, tmp_path):
    nb = opened(*town(tmp_path)); page,images = nb.page,nb.page.locator('.pipa-images'); images.wait_for()
    assert nb.py("page.surface.pens and [o['title'] for o in page.surface.panels]")==[f'target {i}' for i in range(1, 7)]
    images.focus(); page.keyboard.press('2'); nb.wait('page.surface.pen==1')
    page.evaluate("""() => { const c = document.querySelector('.pipa-images'); window.ms = [];
        c.addEventListener('pointerup', () => { const t = performance.now(), n = c.dataset.marks; requestAnimationFrame(() => requestAnimationFrame(() =>
            window.ms.push(c.dataset.marks !== n ? performance.now() - t : 1e9))); }, true) }""")
    page.mouse.click(*nb.at('.pipa-images', 1, .25, .5)); nb.until('() => window.ms.length===1')
    assert page.evaluate('() => window.ms[0]')<1e9, 'the mark is there two frames later, whatever Python does'
    name = nb.py('page.pen.names[page.pen.which[1]]'); nb.wait('len(page.pen.clicks)==1')
    (row,) = nb.py(rows); assert row[0]==name and row[3]=='car' and abs(row[1]-64)<=1 and abs(row[2]-64)<=1
    assert (tmp_path/'clicks.csv').read_text().splitlines()[1].startswith(f'{name},{row[1]},{row[2]},car')
    nb.until("() => /^car 1 of 9 · the net said .* · saved$/.test(document.querySelector('.pipa-said').textContent)")
    a,b = nb.at('.pipa-images', 0, .2, .2),nb.at('.pipa-images', 0, .8, .2)   # two fast clicks
    page.mouse.click(*a); page.mouse.click(*b); nb.wait('len(page.pen.clicks)==3')
    page.keyboard.press('Backspace'); nb.wait('len(page.pen.clicks)==2')
    page.mouse.move(*a); page.keyboard.press('Delete'); nb.wait('len(page.pen.clicks)==1')
    chip = page.locator('.pipa-chip[data-name="sky"]'); chip.click(); nb.wait('page.surface.pen==2')
    assert chip.evaluate('e => e===document.activeElement') and page.locator('.pipa-chip[data-name="car"] small').inner_text()=='1/9'
    page.mouse.move(*nb.at('.pipa-images', 2, .5, .5)); images.focus()   # the place below the mouse stays there while it is zoomed
    for _ in range(5): page.keyboard.press('+')
    page.mouse.click(*nb.at('.pipa-images', 2, .5, .5)); nb.wait('len(page.pen.clicks)==2')
    x,y,label = nb.py(rows)[1][1:]; assert label=='sky' and abs(x-128)<=1 and abs(y-64)<=1
    page.mouse.click(*nb.at('.pipa-images', 2, .9, .5)); nb.wait('len(page.pen.clicks)==3')
    x = nb.py(rows)[2][1]; assert abs(x-(128+.4*256/1.5**5))<=1
    page.keyboard.press(' '); nb.wait('len(page.pen.clicks)==3')
    page.keyboard.press('Escape'); nb.wait('page.surface.pen==-1')
    page.mouse.click(*nb.at('.pipa-images', 3, .5, .5)); nb.wait('page.queries and page.queries[0][0]==3 and len(page.pen.clicks)==3')
    chip.click(); nb.wait('page.surface.pen==2'); page.keyboard.press('1'); nb.wait('page.surface.pen==0')   # a chip has the keys, too
    page.keyboard.press('n'); nb.wait("page.surface.go['panel']>=0 and page.surface.said.startswith('Unsure')")
    assert nb.py("PixelEmbeddingExplorer(page.looks.learn, clicks=home/'clicks.csv', n_images=2, n=10).pen.clicks==page.pen.clicks")

def test_train_a_minute(opened, tmp_path):
    "The kernel has its turns: a cell, a click and *stop* are heard while it trains, an interrupt too; the slider goes back"
    nb = opened(*town(tmp_path)); page,images,button = nb.page,nb.page.locator('.pipa-images'),nb.page.locator('.pipa-train'); images.wait_for()
    says = lambda what, t=60: nb.until(f"() => /{what}/.test(document.querySelector('.pipa-said').textContent)", t)
    assert button.inner_text()=='train a minute' and not page.locator('.pipa-checkpoint').is_visible()
    button.click(); says('^There is no click to learn from')
    images.focus(); page.keyboard.press('2'); page.mouse.click(*nb.at('.pipa-images', 1, .25, .5)); nb.wait('len(page.pen.clicks)==1')
    before = images.screenshot(); button.click(); says(r'^training: \d+ s of 60, loss \d*\.\d\d · stop'); assert button.inner_text()=='stop'
    n = nb.py('len(page.minute.losses)'); nb.wait(f'len(page.minute.losses)>{n}')   # cells run, and it goes on
    page.mouse.click(*nb.at('.pipa-images', 0, .8, .5)); nb.wait('len(page.pen.clicks)==2'); says('saved, counts from the next minute$|^training')
    assert (tmp_path/'clicks.csv').read_text().count('\n')==3
    nb.wait('page.minute.drawn>0'); button.click(); says(r'^minute 1: \d+ steps in .* · 1 click on 1 of 8 target images · slide back to undo$')
    assert button.inner_text()=='train a minute' and page.locator('.pipa-checkpoint').is_visible() and images.screenshot()!=before
    handle = page.locator('.pipa-checkpoint [role=slider], .pipa-checkpoint .noUi-handle').first
    assert 'minute 1' in page.locator('.pipa-checkpoint').inner_text(); handle.focus(); page.keyboard.press('ArrowLeft'); nb.wait('page.checkpoint==0')
    button.click(); says('^training: .* loss')
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.interrupt()"); says('^minute 2: .* 2 clicks on 2 of 8')
    assert nb.py("(page.looks.names, page.checkpoint, page.minute is None)")==[['before', 'minute 1', 'minute 2'], 2, True]
    nb.py('bool(page.train(1.5))'); says('^minute 3: ', 90)
    assert nb.py("len(page.looks.learn.cbs)==len([cb for cb in page.looks.learn.cbs if cb.learn is page.looks.learn])")

@pytest.mark.slow
def test_pen_answers_within_a_second(opened, tmp_path, capsys):
    "From the click to the new maps, as a user sees it. Run it alone: `pytest -m slow -s -k within_a_second tests/test_browser.py`"
    nb = opened(*town(tmp_path)); nb.page.locator('.pipa-images').wait_for()
    nb.page.evaluate("""() => { const c = document.querySelector('.pipa-images'), s = document.querySelector('.pipa-said'); let at = 0; window.ms = [];
        c.addEventListener('pointerup', () => { at = performance.now(); }, true);
        new MutationObserver(() => { if (at && s.textContent.endsWith('saved')) { window.ms.push(performance.now() - at); at = 0; } }).observe(s, { childList: true }); }""")
    nb.page.locator('.pipa-images').focus(); nb.page.keyboard.press('1')
    for i in range(8):
        nb.page.mouse.click(*nb.at('.pipa-images', i%6, .1+.1*i, .5)); nb.until('n => window.ms.length===n', 30, arg=i+1)
    ms = nb.page.evaluate('() => window.ms')
    with capsys.disabled(): print(f'\nclick to new maps: median {statistics.median(ms):.0f} ms, fastest {min(ms):.0f} ms of {len(ms)}')
    assert min(ms)<1000

def test_python_is_gone(opened):
    nb = opened(arrays); nb.page.locator('.pipa-images').wait_for()
    nb.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    nb.until("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status==='idle'", 120)
    nb.page.mouse.click(*nb.at('.pipa-images', 0, .5, .5))
    nb.until("() => /run the cell again/.test(document.querySelector('.pipa-said').textContent)", 30)

large = '''import numpy as np
from pipa.look.views import views
from pipa.widgets import PixelEmbeddingExplorer
rng = np.random.default_rng(0)
page = PixelEmbeddingExplorer(views(rng.integers(0, 256, (2,1024,2048,3), dtype=np.uint8), rng.normal(size=(2,16,32,4))), hover=False)
got = []
page.surface.react['click'] = got.append
page'''

@pytest.mark.slow
def test_a_large_image_is_clicked_to_the_pixel(opened):
    nb = opened(large); images = nb.page.locator('.pipa-images'); images.wait_for()
    assert nb.py("page.surface.panels[0]['W']")==720 and nb.py('len(page.surface.base)')==2*720*360*4
    nb.page.mouse.move(*nb.at('.pipa-images', 0, .25, .25)); images.focus()
    for _ in range(8): nb.page.keyboard.press('+')
    nb.wait('page.surface.fine==0'); assert nb.py('len(page.surface.fine_base)')==4*1024*2048
    s = 1.5**8
    for dx,dy in ((0, 0), (.3, -.2)):
        nb.page.mouse.click(*nb.at('.pipa-images', 0, .25+dx, .25+dy)); nb.wait(f'len(got)=={1 if not dx else 2}')
    a,b = nb.py("[[o['x'], o['y']] for o in got]")
    assert abs(a[0]-512)<3 and abs(a[1]-256)<3 and abs(b[0]-a[0]-.3*2048/s)<.5 and abs(b[1]-a[1]+.2*1024/s)<.5

@pytest.mark.slow
def test_dark_theme_is_noticed(opened, lab):
    themes = lab[3]/'settings/@jupyterlab/apputils-extension/themes.jupyterlab-settings'
    themes.write_text('{"theme": "JupyterLab Dark"}')
    try:
        nb = opened(crops)
        nb.wait('pairs.dark'); assert nb.page.locator('.pipa-surface.pipa-dark').count()==2
    finally: themes.unlink()

@pytest.mark.slow
def test_what_should_fail_fails(opened):
    nb = opened('page = None', 'raise ValueError("on purpose")', errors=['ValueError: on purpose'])
    with pytest.raises(TimeoutError): nb.wait('page is not None', 1)
    with pytest.raises(RuntimeError, match='NameError'): nb.py('nothing')
    with pytest.raises(PlaywrightTimeout): nb.until("() => document.querySelector('.pipa-surface')", 1)

def test_exported_page_lives_without_python(browser, tmp_path):
    from test_widgets import explorer
    explorer(queries=[(0,3,3,1)]).to_html(tmp_path/'a.html')
    ctx,bad = browser.new_context(viewport=dict(width=1200, height=900)),[]
    page = ctx.new_page()
    page.on('pageerror', lambda e: bad.append(str(e)))
    page.on('request', lambda r: r.url.startswith(('file:', 'data:', 'blob:')) or bad.append(r.url))
    page.goto((tmp_path/'a.html').as_uri())
    page.locator('.pipa-points').wait_for()
    b = page.locator('.pipa-images').bounding_box(); page.mouse.move(b['x']+40, b['y']+60)
    page.wait_for_function("() => /x \\d+, y \\d+/.test(document.querySelector('.pipa-here').textContent)", timeout=10_000)
    assert not bad; ctx.close()

# How many different colours the first canvas of images has
colours = """() => { const c = document.querySelector('.pipa-images');
  return c.width && new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size }"""

# JupyterLab stands for the front ends in the normal run, and cells of this file for the tutorials
# --- other front ends -------------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_notebook_7(browser, tmp_path):
    needs('notebook', 'Notebook 7')
    home,work = tmp_path/'home',tmp_path/'work'; work.mkdir()
    write_notebook(work/'a.ipynb', arrays)
    with server(work, home, 'notebook') as (url,token):
        ctx = browser.new_context(viewport=dict(width=1300, height=1000)); bad = []
        page = ctx.new_page()
        # Notebook's own frame (7.6) stumbles over one of its settings, with or without a widget; nothing else may fail
        def frames_own(e): return "reading 'schema'" in str(e) and 'notebook_core' in (e.stack or '')
        page.on('pageerror', lambda e: frames_own(e) or bad.append(f'script: {e}'))
        page.on('request', lambda r: r.url.startswith((host_of(url), host_of(url).replace('http', 'ws'), 'data:', 'blob:')) or bad.append(r.url))
        nb = Notebook(page, url, token, 'a.ipynb')
        assert not nb.run()
        images = page.locator('.pipa-images').first; images.wait_for(); images.scroll_into_view_if_needed()
        nb.until(f'() => ({colours})() > 100'); before,heats = images.screenshot(),int(page.locator('.pipa-surface').first.get_attribute('data-heats'))
        page.mouse.click(*nb.at('.pipa-images', 1, .5, .9)); nb.wait('page.queries and page.queries[0][0]==1')
        nb.until("n => +document.querySelector('.pipa-surface').dataset.heats > n && /similarity/.test(document.querySelector('.pipa-said').textContent)", arg=heats)
        assert images.screenshot()!=before
        images.focus(); page.keyboard.press('Backspace'); nb.wait('not page.queries')
        assert not bad, bad
        page.evaluate("() => { setTimeout(() => { throw new Error('on purpose') }) }"); page.wait_for_timeout(500)
        assert bad==['script: on purpose'], 'an error of a script would be noticed'
        ctx.close()

@pytest.mark.slow
def test_voila(browser, tmp_path):
    needs('voila', 'Voilà')
    home,work = tmp_path/'home',tmp_path/'work'; work.mkdir()
    write_notebook(work/'a.ipynb', arrays)
    with server(work, home, 'voila') as (url,token):
        ctx = browser.new_context(viewport=dict(width=1300, height=1000)); bad = []
        page = ctx.new_page()
        page.on('pageerror', lambda e: bad.append(f'script: {e}'))
        # Voilà's own frame would like icons and formulas from a server of theirs, and lives without; nothing else may be asked
        page.on('request', lambda r: r.url.startswith((host_of(url), host_of(url).replace('http', 'ws'), 'data:', 'blob:'))
                or any(o in r.url for o in ('fontawesome', 'mathjax')) or bad.append(r.url))
        page.goto(f'{url}/a.ipynb?token={token}', wait_until='domcontentloaded', timeout=240_000)
        images,points = page.locator('.pipa-images'),page.locator('.pipa-points')
        images.wait_for(timeout=240_000); before = images.screenshot()
        page.mouse.click(*at_panel(page, '.pipa-images', 0, .1, .2))
        said = lambda s: page.wait_for_function("s => document.querySelector('.pipa-said').textContent.includes(s)", arg=s, timeout=30_000)
        said('similarity 1.00'); assert images.screenshot()!=before
        b = points.bounding_box(); m = page.mouse
        m.move(b['x']+4, b['y']+4); m.down()
        for x,y in ((.99,.01), (.99,.99), (.01,.99)): m.move(b['x']+x*b['width'], b['y']+y*b['height'], steps=4)
        m.up(); said('180 pixels')
        ctx.close()
    assert not bad, bad

@pytest.mark.slow
def test_pen_in_voila(browser, tmp_path):
    needs('voila', 'Voilà')
    home,work = tmp_path/'home',tmp_path/'work'; work.mkdir()
    write_notebook(work/'a.ipynb', *town(tmp_path/'town'))
    with server(work, home, 'voila') as (url,token):
        ctx = browser.new_context(viewport=dict(width=1300, height=1000)); bad = []
        page = ctx.new_page(); page.on('pageerror', lambda e: bad.append(f'script: {e}'))
        page.goto(f'{url}/a.ipynb?token={token}', wait_until='domcontentloaded', timeout=240_000)
        page.locator('.pipa-images').wait_for(timeout=240_000)
        page.locator('.pipa-chip[data-name="car"]').click(); page.mouse.click(*at_panel(page, '.pipa-images', 0, .5, .5))
        page.wait_for_function("() => document.querySelector('.pipa-said').textContent.endsWith('saved')", timeout=30_000)
        assert (tmp_path/'town/clicks.csv').read_text().splitlines()[1].endswith(',128,64,car,4')
        page.locator('.pipa-train').click()
        page.wait_for_function("() => /^training: .* loss/.test(document.querySelector('.pipa-said').textContent)", timeout=60_000)
        page.locator('.pipa-train').click()
        page.wait_for_function("() => /^minute 1: /.test(document.querySelector('.pipa-said').textContent)", timeout=60_000)
        ctx.close()
    assert not bad, bad

@pytest.mark.slow
@pytest.mark.parametrize('name', ['explore', 'patches'])
def test_tutorial(opened, name):
    nb = opened(root/f'nbs/tutorials/{name}.ipynb')
    nb.page.locator('.pipa-images').first.wait_for()
    nb.page.mouse.click(*nb.at('.pipa-images', 0, .5, .7))
    nb.wait('page.surface.done>0')

# --- how fast ---------------------------------------------------------------------------------------------------------------------------
big = '''import numpy as np
from pipa.look.views import views
from pipa.widgets import PixelEmbeddingExplorer
rng = np.random.default_rng(0)
emb = rng.standard_normal((8,128,256,256), np.float32)
page = PixelEmbeddingExplorer(views(rng.integers(0, 256, (8,128,256,3), dtype=np.uint8), emb, domain=['game']*4+['real']*4), n=5, hover=False)
del emb
page'''

watch = """() => {
  const root = document.querySelector('.pipa-surface'), images = document.querySelector('.pipa-images'); let at = 0; window.ms = [];
  images.addEventListener('pointerup', () => { at = performance.now(); }, true);
  new MutationObserver(() => { if (at) window.ms.push(performance.now() - at); at = 0; }).observe(root, { attributeFilter: ['data-heats'] }); }"""

@pytest.mark.slow
def test_from_the_click_to_the_heat_map(opened, capsys):
    "Eight images of 128×256 with 256 numbers a pixel: the time that a user sees. Run it alone: `pytest -m slow -s -k heat_map tests/test_browser.py`"
    nb = opened(big)
    nb.page.locator('.pipa-images').wait_for(); nb.page.evaluate(watch)
    for i in range(11):
        nb.page.mouse.click(*nb.at('.pipa-images', i%2, .1+.07*i, .5))
        nb.until('n => window.ms.length===n', 30, arg=i+1)
    ms = nb.page.evaluate('() => window.ms')[1:]
    with capsys.disabled(): print(f'\nclick to heat map: median {statistics.median(ms):.0f} ms, fastest {min(ms):.0f} ms of {len(ms)}')
    assert min(ms)<1000
