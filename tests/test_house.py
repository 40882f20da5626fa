"The habits of the house: notebooks run, modules and README are made from them, arrows between modules go down."
import ast, configparser, contextlib, importlib, inspect, json, os, re, runpy, shutil, signal, subprocess, sys
from pathlib import Path
import pytest
from fastcore.docments import docments
from apart import forked, python, say_to

root = Path(__file__).resolve().parents[1]
cfg = configparser.ConfigParser(delimiters=['=']); cfg.read(root/'settings.ini', encoding='utf8')
cfg = cfg['DEFAULT']
def page(p): return p.relative_to(root/'nbs').with_suffix('').as_posix()     # such as `sets/01_domains`
nbs = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not any(o[0] in '_.' for o in p.relative_to(root/'nbs').parts))
modules = sorted(p for p in (root/'pipa').rglob('*.py') if p.name[0]!='_')
stems = ['.'.join(p.relative_to(root/'pipa').with_suffix('').parts) for p in modules]     # such as `sets.domains`
every_nb,every_module = pytest.mark.parametrize('nb', nbs, ids=page),pytest.mark.parametrize('mod', stems)

def cells(nb): return json.loads(nb.read_text(encoding='utf8'))['cells']
def source(cell): return ''.join(cell['source'])
def sh(*args, cwd=root, **env):
    r = subprocess.run([str(o) for o in args], cwd=cwd, env={**os.environ, **env}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    return r.returncode,r.stdout,r.stderr

# --- every notebook is a case -----------------------------------------------------------------------------------------------------------
# Each has a process of its own.
def _run_nb(nb, log, cache, skip):
    "In its own process: run the notebook as `nbdev_test` does, with everything it prints in `log`"
    say_to(log)
    os.environ.update(IN_TEST='1', XDG_CACHE_HOME=str(cache), MPLCONFIGDIR=os.environ.get('MPLCONFIGDIR') or _mpl_dir())
    signal.signal(signal.SIGINT, signal.default_int_handler)   # as in a terminal; a background job of a shell ignores it
    from nbdev.test import test_nb
    ok,_ = test_nb(Path(nb), skip_flags=skip, basepath=root)
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(0 if ok else 1)

def _mpl_dir():
    import matplotlib
    return matplotlib.get_cachedir()

# Pages that export nothing and train for a while; *quickstart* stands for them in the normal run.
trains = [f'tutorials/{o}' for o in 'ablation explore own_data patches scale scratch'.split()]

def _notebook(nb, tmp_path, shared, skip):
    log = tmp_path/'log'
    code = forked(_run_nb, nb, log, shared, skip, timeout=900)   # a machine with other work may need long
    if code is None: pytest.fail(f'{nb.name} ran for more than 15 minutes')
    if code: pytest.fail(f'{nb.name} failed:\n{log.read_text(errors="replace")[-6000:]}', pytrace=False)

@pytest.mark.parametrize('nb', [pytest.param(p, marks=[pytest.mark.slow]*(page(p) in trains)) for p in nbs], ids=page)
def test_notebook(nb, tmp_path, shared):
    "What pages draw and count is drawn and counted once: `shared` is the cache of them all"
    _notebook(nb, tmp_path, shared, cfg['tst_flags'].split())

@pytest.mark.slow
@pytest.mark.parametrize('nb', [p for p in nbs if '#| slow' in p.read_text(encoding='utf8')], ids=page)
def test_notebook_with_its_slow_cells(nb, tmp_path, shared):
    _notebook(nb, tmp_path, shared, ['cuda'])

def test_a_failing_notebook_fails(tmp_path):
    nb = json.loads(nbs[0].read_text(encoding='utf8'))
    nb['cells'] = [dict(cell_type='code', id='a', metadata={}, execution_count=None, outputs=[], source=['assert 1==2, "on purpose"'])]
    (tmp_path/'bad.ipynb').write_text(json.dumps(nb))
    with pytest.raises(pytest.fail.Exception, match='on purpose'): _notebook(tmp_path/'bad.ipynb', tmp_path, tmp_path, [])

# --- what is made is as it would be made now --------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A copy of the notebooks, exported and cleaned"
    to = tmp_path_factory.mktemp('made')/root.name
    shutil.copytree(root/'nbs', to/'nbs', ignore=shutil.ignore_patterns('.*', 'images')); shutil.copy(root/'settings.ini', to)
    (to/'pipa').mkdir(); shutil.copy(root/'pipa/__init__.py', to/'pipa')
    for cmd in ('export', 'clean'):
        code = f'from nbdev.{dict(export="doclinks", clean="clean")[cmd]} import nbdev_{cmd} as f; f.__wrapped__()'
        ret,out,err = sh(sys.executable, '-c', code, cwd=to, IN_TEST='')
        assert not ret and 'Warning' not in err, f'nbdev_{cmd}: {out}{err}'
    return to

def differing(a, b, glob):
    names = {p.relative_to(o).as_posix() for o in (a, b) for p in o.rglob(glob) if '.ipynb_checkpoints' not in p.parts}
    return sorted(n for n in names if not ((a/n).exists() and (b/n).exists() and (a/n).read_bytes()==(b/n).read_bytes()))

def test_modules_are_what_the_notebooks_export(made):
    assert not differing(root/'pipa', made/'pipa', '*.py'), 'run nbdev_export'

def test_notebooks_are_clean(made):
    assert not differing(root/'nbs', made/'nbs', '*.ipynb'), 'run nbdev_clean'

def test_readme_is_made_from_index():
    readme = runpy.run_path(str(root/'.ci/readme.py'))['render']   # not above, where each notebook's process would pay for its imports
    assert text_of_readme()==readme(root/'nbs/index.ipynb'), 'run python .ci/readme.py'

def test_readme_links_lead_somewhere():
    links = re.findall(r'\]\(([^)\s#]+)(?:#[^)\s]*)?\)', text_of_readme())
    assert len(links)>5 and not [o for o in links if not o.startswith('http') and not (root/o).exists()]

def text_of_readme(): return (root/'README.md').read_text(encoding='utf8')

def test_readme_is_short(): assert len(text_of_readme().split())<=1450

def test_readme_table_is_measured():
    "Its first three columns: method, seeds, mIoU"
    from pipa.runs.tables import results_markdown
    short = ['|'.join(o.split('|')[:4])+'|' for o in results_markdown(root/'data/results/minicity.csv').splitlines()]
    assert len(short)>4 and '\n'.join(short) in text_of_readme(), 'run python .ci/readme.py'

def test_readme_numbers_are_measured():
    "Those of the sentences below the table, counted here from the rows"
    import pandas as pd
    def runs(name, method):
        o = pd.read_csv(root/f'data/results/{name}.csv').query('method==@method')
        s = o.settings.astype(object).fillna('usual')
        return 100*o[s==s.mode()[0]].set_index('seed').miou_student
    text = text_of_readme()
    d = (runs('minicity', 'pipa')-runs('minicity', 'self_training')).dropna()
    assert f'gains {d.mean():.1f} points over {len(d)} seeds' in text
    for m in ('pipa', 'self_training', 'self_training+fda'):
        v = runs('town_camvid', m)
        assert f'{v.mean():.1f} ± {v.std():.1f}' in text
    from pipa.runs.study import gains
    g = gains(root/'data/results/ablation.csv').query('terms=="both"').gain
    assert f'raised {(g>0).sum()} of {len(g)}, by {g.min():.1f} to {g.max():.1f} points' in text

def test_version():
    from pipa import __version__
    assert __version__==cfg['version'] and f'## {__version__}' in (root/'CHANGELOG.md').read_text(encoding='utf8')

# --- arrows go down ---------------------------------------------------------------------------------------------------------------------
# A page uses only pages above it. In the core their numbers are the order; a folder stands behind the core page of this number, folders of one
# number in this order, and inside a folder numbers count again. Nobody but the command line uses `bench` and `runs`.
rooms = dict(sets=11, weights=8, nets=8, hints=16, look=27, runs=27, bench=27)
leaves = 'labels losses mix mit encoders fast models hrda minicity'.split()

def number(p): return int(m[0]) if (m := re.match(r'\d+', p.stem)) else None
def room(p): return p.parent.name if p.parent!=root/'nbs' else ''
def floor(p):
    "Where an exporting page stands"
    return (rooms[r], 1+[*rooms].index(r), number(p)) if (r := room(p)) else (number(p), 0, 0)

exporting = [p for p in nbs if number(p) is not None]
where = {'.'.join([room(p)]*bool(room(p)) + [re.sub(r'^\d+_', '', p.stem)]):floor(p) for p in exporting}

def imports(mod):
    "Dotted names that a module imports, at the top or inside a function"
    *home,_ = ['pipa', *mod.split('.')]
    for o in ast.walk(ast.parse((root/f'pipa/{mod.replace(".", "/")}.py').read_text(encoding='utf8'))):
        if isinstance(o, ast.Import): yield from (a.name for a in o.names)
        if isinstance(o, ast.ImportFrom):
            base = '.'.join(home[:len(home)+1-o.level]*bool(o.level) + [o.module]*bool(o.module))
            if base in ('pipa', *(f'pipa.{k}' for k in rooms)): yield from (f'{base}.{a.name}' for a in o.names)
            else: yield base

def test_every_page_has_a_place_and_a_module_of_its_name():
    assert sorted(where)==sorted(stems) and len({*where.values()})==len(where), 'each number once in its folder'
    for p in exporting:
        first = next(s for s in map(source, cells(p)) if '#| default_exp' in s)
        assert where[re.search(r'#\| default_exp (\S+)', first)[1]]==floor(p)

@every_module
def test_layers(mod):
    used = {o.removeprefix('pipa.') for o in imports(mod) if o.startswith('pipa.')} - {'__version__'}
    high = {o for o in used if where[o]>=where[mod]}
    assert not high, f'{mod} may not import {high}'
    top = {o for o in used if o.split('.')[0] in ('bench', 'runs')}
    assert not top or mod=='cli' or mod.split('.')[0] in ('bench', 'runs'), f'{mod} may not import {top}'

@every_module
def test_narrow_imports(mod):
    used = set(imports(mod))
    assert not {o for o in used if o.split('.')[0]=='nbdev'}, 'nbdev is for authors, not for users'
    assert 'fastai.vision.all' not in used, 'import from the part of fastai that you need'
    if mod in leaves: assert {o for o in used if o.startswith('fastai')}<={'fastai.torch_basics'}

def test_import_asks_the_net_for_nothing(tmp_path):
    code = '''
import importlib, socket, sys
def no(*a, **k): raise RuntimeError(f'the network is asked: {a}')
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = no
for o in sys.argv[1:]: importlib.import_module(f'pipa.{o}')
assert not [o for o in sys.modules if o.split('.')[0]=='nbdev' or o=='fastai.vision.all']'''
    ret,out,err = sh(sys.executable, '-c', code, *stems)
    assert not ret, out+err

# --- pages and code that are pleasant to read -------------------------------------------------------------------------------------------
def has_default(cell): return '#| default_exp' in source(cell)

@every_nb
def test_anatomy(nb):
    cs = cells(nb)
    text = '\n\n'.join(source(c) for c in cs[:2])
    assert re.match(r'# \S.*\n+> \S', text), 'a notebook starts with `# title` and `> one sentence`'
    assert nb.stat().st_size<400_000, 'figures are small: a notebook has less than 400 kB'
    assert not [o for c in cs for o in c.get('outputs', []) if o['output_type']=='error']
    assert not [o for c in cs for o in c.get('outputs', []) if o.get('name')=='stderr'], 'warnings, which name a machine, are no output'
    assert len({c['id'] for c in cs})==len(cs), 'each cell has a name of its own'
    assert 'widgets' not in json.loads(nb.read_text(encoding='utf8'))['metadata']
    if any(map(has_default, cs)): assert 'nbdev_export()' in source(cs[-1]), 'the last cell exports'

def exported(nb): return [source(c) for c in cells(nb) if c['cell_type']=='code' and re.match(r'#\| *exporti?s?\b', source(c))]

def counts(line):
    "Is it code? Not if it is blank, a comment, or a parameter (or field) with its docment"
    line = line.strip()
    return line!='' and line[0]!='#' and not re.match(r'\*{0,2}\w+(:[^#]*)?(=[^#]*)?,?\s*#', line)

def joined(code):
    "Statements on one line, `;` between them, but for short pairs of assignments"
    for o in ast.walk(ast.parse(code)):
        for body in (getattr(o, k, None) for k in ('body', 'orelse', 'finalbody')):
            if not isinstance(body, list): continue
            for i,j in zip(body, body[1:]):
                one = i.end_lineno==j.lineno
                pair = all(isinstance(k, (ast.Assign, ast.AugAssign, ast.AnnAssign)) for k in (i, j)) and j.end_col_offset-i.col_offset<=60
                alone = [k.lineno for k in body].count(j.lineno)==2
                if one and not (pair and alone and i.lineno==j.end_lineno): yield code.splitlines()[j.lineno-1].strip()

@every_nb
def test_exported_cells_are_short(nb):
    long = [f'{n} lines: {s.splitlines()[1]}' for s in exported(nb) if (n := sum(map(counts, s.splitlines())))>25]
    assert not long, 'cut along ideas (`@patch` for methods):\n' + '\n'.join(long)

@every_nb
def test_exported_lines_are_short(nb):
    long = [l for s in exported(nb) for l in s.splitlines() if len(l)>120]
    assert not long, 'more than 120 characters:\n' + '\n'.join(long)

@every_nb
def test_one_statement_a_line(nb):
    bad = [l for s in exported(nb) for l in joined(s)]
    assert not bad, '`;` is for short pairs of assignments:\n' + '\n'.join(bad)

def test_the_rules_see_what_they_should():
    assert [counts(o) for o in ('', '# why', '    x:int=3, # Side, px', '    *xs # Others', '  n:int # Field', ')->int: # Sum', 'x = f(3) # why', 'def f(x, # Doc')]==[False]*5+[True]*3
    assert {*joined('a = 1; b = 2\nfor i in x: f(i); g(i)\nif x: a = 1; f()\na = 1; b = 2; c = 3\nx += 1; y = x')}=={
        'for i in x: f(i); g(i)', 'if x: a = 1; f()', 'a = 1; b = 2; c = 3'}

# Docments are aligned under their function, and small things stand side by side: these rules of chkstyle aren't ours.
not_ours = 'continuation-indent semicolon lhs-assignment-annotation inefficient-multiline-expression single-statement-body'.split()

@every_nb
def test_style(nb, tmp_path, capsys):
    from chkstyle.core import main
    (tmp_path/nb.name).write_text(nb.read_text(encoding='utf8').replace('#| exporti', '#| export'), encoding='utf8') # unknown to chkstyle
    ret,out = main(['chkstyle', '--ignore', ','.join(not_ours), str(tmp_path/nb.name)]),capsys.readouterr().out
    assert not ret and 'found 0 potential' in out, out

def public(mod): m = importlib.import_module(f'pipa.{mod}'); return [(n, getattr(m, n)) for n in m.__all__]

@every_module
def test_public_names_are_documented(mod):
    from fastai.callback.core import Callback   # not above: a notebook that does without fastai is to run without it
    bad = []
    for n,o in public(mod):
        if not inspect.isfunction(o) and not inspect.isclass(o) or not o.__module__.startswith('pipa'): continue
        if not (o.__doc__ or '').strip(): bad.append(f'{n} has no docstring')
        o = o.__init__ if inspect.isclass(o) and issubclass(o, Callback) and '__init__' in vars(o) else o
        if inspect.isfunction(o):
            named = {k for k,p in inspect.signature(o).parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and k!='self'}
            vague = [k for k,v in docments(o, full=True).items() if k in named and not v['docment']]
            if vague: bad.append(f'{n}: {", ".join(vague)}')
    assert not bad, 'parameters without a comment:\n' + '\n'.join(bad)

# One public name has one meaning in all modules, and what begins with `_` stays in its module.
def defined(mod):
    "Public names that a module defines at its top, but for methods added by `@patch`"
    for o in ast.parse((root/f'pipa/{mod.replace(".", "/")}.py').read_text(encoding='utf8')).body:
        added = isinstance(o, ast.FunctionDef) and any('patch' in ast.dump(d) for d in o.decorator_list)
        if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and not added: yield o.name
        for t in o.targets if isinstance(o, ast.Assign) else ():
            yield from (e.id for e in (t.elts if isinstance(t, ast.Tuple) else [t]) if isinstance(e, ast.Name))

def test_a_public_name_has_one_meaning():
    homes = {}
    for m in stems:
        for n in {*defined(m)}: homes.setdefault(n, []).append(m)
    double = {n:ms for n,ms in homes.items() if len(ms)>1 and n[0]!='_'}
    assert not double, f'one name, two meanings: {double}'

def test_one_place_knows_the_mean_and_the_deviation_of_images():
    "Pages and modules ask `pipa.mix`; a test may write the numbers down, as an oracle"
    of = re.compile(r'\.485\b|\.229\b|imagenet_stats')
    bad = [p.name for p in modules if of.search(p.read_text(encoding='utf8'))]
    bad += [p.name for p in nbs for c in cells(p) if c['cell_type']=='code' and of.search(source(c))]
    assert sorted(bad)==['03_mix.ipynb', 'mix.py'], 'take `normed` and `unnormed`, or the two constants'

@every_module
def test_private_names_stay_at_home(mod):
    for o in ast.walk(ast.parse((root/f'pipa/{mod.replace(".", "/")}.py').read_text(encoding='utf8'))):
        if not isinstance(o, ast.ImportFrom) or not o.level: continue
        private = [a.name for a in o.names if a.name[0]=='_' and a.name!='__version__']
        assert not private, f'{mod} takes {", ".join(private)} of {o.module}: give it a public name'

# --- nothing of one machine -------------------------------------------------------------------------------------------------------------
hosts = set('''arxiv.org www.apache.org github.com doi.org docs.fast.ai nbdev.fast.ai pytorch.org huggingface.co
    quarto.org bottosson.github.io localhost'''.split())

def tracked():
    ret,out,_ = sh('git', 'ls-files', '-co', '--exclude-standard')
    return [root/o for o in out.splitlines() if (root/o).is_file()] if not ret else pytest.skip('not in a git repository')

def test_nothing_of_this_machine():
    bad = []
    for p in tracked():
        with contextlib.suppress(UnicodeDecodeError):
            text = re.sub(r'"image/png": "[^"]*"', '', p.read_text(encoding='utf8'))
            bad += [f'{p.relative_to(root)}: {m[0]}' for m in re.finditer(r'(?<![\w.~*-])/(?:work|root|opt|home)(?=/)[^\s"]*', text)]
            bad += [f'{p.relative_to(root)}: {m[0]}' for m in re.finditer(r'https?://([\w.-]+)', text) if m[1] not in hosts]
    assert not bad, '\n'.join(bad)

def test_nothing_is_big():
    big = {str(p.relative_to(root)):p.stat().st_size for p in tracked() if p.stat().st_size>2_000_000}
    assert not big and sum(p.stat().st_size for p in tracked() if (root/'data/sample') in p.parents)<1_000_000

# --- the name of the distribution -------------------------------------------------------------------------------------------------------
# `pipa` on the package index is another program: whoever installs that by our advice runs code of strangers.
wrong_name = re.compile(r"""pip install (?:-\S+ )*["']?pipa(?![\w-])""")

@pytest.mark.parametrize('line,bad', [("pip install pipa", 1), ("`pip install 'pipa[onnx]'`", 1), ("pip install -U pipa\n", 1), ("pip install 'pipa\\[onnx", 1),
                                      ("pip install 'pipa-uda[onnx]'", 0), ("pip install '.[onnx]'", 0), ("pip install -e '/disk/pipa[onnx]'", 0)])
def test_which_lines_install_a_stranger(line, bad): assert bool(wrong_name.search(line))==bool(bad)

def test_no_line_installs_a_stranger():
    bad = []
    for p in tracked():
        if p==Path(__file__).resolve(): continue
        with contextlib.suppress(UnicodeDecodeError):
            bad += [f'{p.relative_to(root)}: {m[0]}' for m in wrong_name.finditer(p.read_text(encoding='utf8'))]
    assert not bad, 'the distribution is pipa-uda:\n' + '\n'.join(bad)

def test_distribution_has_a_name_of_its_own():
    ret,out,err = sh(sys.executable, 'setup.py', '-q', '--name', '--version')
    assert not ret and out.split()==['pipa-uda', cfg['version']], out+err
    assert cfg['lib_path']=='pipa' and not [k for k in ('doc_host', 'git_url', 'author_email', 'user') if cfg.get(k)], 'an address that nobody has'

def test_what_installs_an_extra(tmp_path):
    "From a checkout its folder, from an installed package its name"
    shutil.copytree(root/'pipa', tmp_path/'site/pipa')
    code = "from pipa.basics import install_command, need; print(install_command('onnx')); need('no_such_thing', 'An ONNX file', 'onnx')"
    for place,says in ((root, f'pip install -e "{root}[onnx]"'), (tmp_path/'site', "pip install 'pipa-uda[onnx]'")):
        ret,out,err = sh(sys.executable, '-c', code, cwd=tmp_path, PYTHONPATH=str(place))
        assert ret and out.strip()==says and f"An ONNX file needs the package `no-such-thing`, which isn't installed: run `{says}`." in err, out+err

def test_extras_are_those_that_are_named():
    named = {m[1] for p in modules for m in re.finditer(r"need\([^()]*, '[^']*', '(\w+)'\)", p.read_text(encoding='utf8'))}
    assert named and named<={k.removeprefix('extra_') for k in cfg if k.startswith('extra_')}

# --- commands ---------------------------------------------------------------------------------------------------------------------------
scripts = [o.split('=') for o in cfg['console_scripts'].split()]

@pytest.mark.parametrize('name,target', scripts, ids=[o[0] for o in scripts])
def test_command_helps(name, target, tmp_path):
    mod,fn = target.split(':')
    (tmp_path/name).write_text(f'import sys\nfrom {mod} import {fn}\nif __name__=="__main__": sys.exit({fn}())\n')
    p = python(tmp_path/name, '--help', COLUMNS=120)
    assert not p.returncode and name in p.stdout and len(p.stdout)>300, p

@pytest.mark.parametrize('name,target', scripts, ids=[o[0] for o in scripts])
def test_options_need_no_underscore(name, target):
    "fastcore writes `--a_b` before its version 2 and `--a-b` since: a word of one part is the same in both"
    mod,fn = target.split(':')
    assert not [o for o in inspect.signature(getattr(importlib.import_module(mod), fn)).parameters if '_' in o]
