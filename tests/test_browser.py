"Widgets and tutorials in a real JupyterLab, driven by mouse and keys"
import shutil
from pathlib import Path
import pytest
from lab import chromium, flags, needs_browser, server, Notebook, write_notebook

needs_browser()
from playwright.sync_api import sync_playwright, TimeoutError as PlaywrightTimeout
root = Path(__file__).resolve().parents[1]

arrays = '''import numpy as np
from pipa.explore import views
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
    home,work = tmp_path_factory.mktemp('lab'),tmp_path_factory.mktemp('notebooks')
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
    ctx,bad,books = browser.new_context(viewport=dict(width=1300, height=1000), accept_downloads=False),[],[]
    page = ctx.new_page()
    page.on('pageerror', lambda e: bad.append(f'script: {e}'))
    page.on('request', lambda r: r.url.startswith((url, url.replace('http', 'ws'), 'data:', 'blob:')) or bad.append(f'outside: {r.url}'))
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
    handle = nb.page.locator('.pipa-checkpoint [role=slider], .pipa-checkpoint .noUi-handle').first
    handle.focus(); nb.page.keyboard.press('ArrowLeft'); nb.wait('page.checkpoint==0')
    assert nb.py("page.surface.caption").startswith('PCA')

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

def test_dark_theme_is_noticed(opened, lab):
    themes = lab[3]/'settings/@jupyterlab/apputils-extension/themes.jupyterlab-settings'
    themes.write_text('{"theme": "JupyterLab Dark"}')
    try:
        nb = opened(crops)
        nb.wait('pairs.dark'); assert nb.page.locator('.pipa-surface.pipa-dark').count()==2
    finally: themes.unlink()

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

@pytest.mark.parametrize('name', ['50_tutorial.explore', '50_tutorial.patches'])
def test_tutorial(opened, name):
    nb = opened(root/f'nbs/{name}.ipynb')
    nb.page.locator('.pipa-images').first.wait_for()
    nb.page.mouse.click(*nb.at('.pipa-images', 0, .5, .7))
    nb.wait('page.surface.done>0')
